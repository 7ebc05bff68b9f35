#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command and under 8 minutes: builds with the CUDA kernels, runs the C++
# and the Python tests with CUDA included, runs the kernels' tests under compute-sanitizer, and benches kernels, copies
# and a step. Writes gpu-check.json and gpu-check.log into the folder given (default: bench/results). Needs Python 3.11
# or later with a CUDA torch (2.11 or later), pytest and hypothesis, nvcc, and no network.
# Usage: bash bench/gpu_check.sh [FOLDER]        PYTHON=... names the interpreter
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-python3}
mkdir -p "${1:-bench/results}"
out=$(cd "${1:-bench/results}" && pwd)
log=$out/gpu-check.log
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH=$root:$root/python PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TMPDIR=$scratch
PATH=$(dirname "$("$python" -c 'import sys; print(sys.executable)')"):$PATH:/usr/local/cuda/bin
export PATH
exec > >(tee "$log") 2>&1

"$python" - <<'CODE' || exit 1
import importlib.util
import sys

if sys.version_info < (3, 11):
    sys.exit(f"error: Python 3.11 or later is needed, this is {sys.version.split()[0]}")
names = ("torch", "numpy", "transformers", "safetensors", "tqdm", "matplotlib", "triton", "setuptools", "pytest", "hypothesis")
missing = [name for name in names if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"error: not installed for {sys.executable}: {', '.join(missing)}")
import setuptools
import torch

if not torch.cuda.is_available():
    sys.exit(f"error: torch {torch.__version__} sees no GPU")
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"error: setuptools 77 or later is needed, this is {setuptools.__version__}")
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}")
CODE
for tool in nvcc cmake c++; do
    command -v "$tool" > /dev/null || { echo "error: $tool not found"; exit 1; }
done

failed=0
: > "$scratch/stages"
note() {
    echo "$1 $2 $3" >> "$scratch/stages"
    [ "$2" -eq 0 ] || failed=1
}
# stage NAME SECONDS COMMAND...: runs it within its limit and the whole check's; a failure does not stop the others.
deadline=470
stage() {
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    [ "$limit" -lt $((deadline - start)) ] || limit=$((deadline - start))
    if [ "$limit" -lt 5 ]; then
        echo "=== $name: not run, no time is left"
        note "$name" 124 0
        return 124
    fi
    echo "=== $name: $*"
    timeout --kill-after=10 "$limit" "$@" || status=$?
    echo "=== $name: status $status, $((SECONDS - start)) s"
    note "$name" "$status" $((SECONDS - start))
    return "$status"
}
build() {
    DISTZO2_CUDA=1 "$python" setup.py --quiet build_ext --inplace && cmake --build build/core
}
# The runtime's tests over libcuda itself. Of a test that is skipped the log gives the reason; if all of a file are, it
# fails.
driver_tests() {
    local test status=0
    for test in host_pool_test copy_engine_cuda_test "training_stress_test cuda_"; do
        # shellcheck disable=SC2086
        DISTZO2_TEST_DRIVER=real DISTZO2_STRESS_STEPS=500 build/core/tests/$test || status=1
    done
    return "$status"
}
export -f build driver_tests
export python

stage build 200 bash -c build || { echo "error: nothing else can run without the build"; exit 1; }
stage cpp-tests 100 ctest --output-on-failure --no-tests=error --label-exclude libcuda --test-dir build/core
stage cpp-driver 60 bash -c driver_tests
checked=(tests/core/test_kernels.py::test_cuda_noise tests/core/test_kernels.py::test_cuda_{in_place,materialize}"["{0..11}"]"
    tests/core/test_embedding.py::test_cuda)
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        stage "$tool" 90 compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 9 --print-limit 20 \
            "$python" -m pytest -q -p no:cacheprovider "${checked[@]}"
    done
else
    echo "=== memcheck: not run, compute-sanitizer not found"
    note memcheck 127 0
fi
stage bench-kernels 80 "$python" bench/bench_kernels.py --device cuda --quick --json "$scratch/kernels.json"
stage bench-copy 60 "$python" bench/bench_copy.py --device cuda --rounds 5 --json "$scratch/copy.json"
stage bench-step 80 "$python" bench/bench_step.py time --device cuda --model opt-1.3b --dtype bfloat16 --batch 1 \
    --tokens 2048 --modes device,host --repeats 5 --skip-plain --json "$scratch/step.json"
# Last, since it takes what time is left; in several processes where pytest-xdist is there.
spread=()
"$python" -c 'import xdist' 2> /dev/null && spread=(-n 6 --dist worksteal)
OMP_NUM_THREADS=2 stage python-tests 300 "$python" -m pytest -q -m "not slow" -p no:cacheprovider "${spread[@]}" \
    --junit-xml="$scratch/tests.xml"

"$python" bench/collect_gpu_check.py "$scratch" "$SECONDS" "$out/gpu-check.json" || failed=1
echo "log: $log"
exit "$failed"
