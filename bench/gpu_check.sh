#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command and under 8 minutes: builds for this GPU, then runs the rows below in
# the order of their worth, each within a time limit: ranks over NCCL, tests on the GPU, ranks over gloo, normals beside
# the CPU's, steps of OPT-13B, the signal of a step by dtype, kernels, copies, compute-sanitizer, the runtime's C++ tests over libcuda, the Python suite.
# After each row gpu-check.json is written anew into the folder given (default: bench/results), so that a run that is cut
# short keeps what it has; at the end stand a table on the terminal, gpu-check.log and gpu-check.png beside it.
# Needs Python 3.11 or later with a CUDA torch (2.11 or later), pytest and hypothesis, nvcc, 32 GiB of free host memory,
# and no network.
# Usage: bash bench/gpu_check.sh [--cpu] [FOLDER]        PYTHON=... names the interpreter
#   --cpu: the same rows, small, on a CPU and with the extension that is built already; those that have no such form
#   are left out. It shows that every bench runs and every figure is drawn.
set -uo pipefail
start_dir=$PWD
cd "$(dirname "$0")/.."
root=$PWD
device=cuda
[ "${1:-}" != --cpu ] || { device=cpu; shift; }
python=${PYTHON:-python3}
[[ $python != */* ]] || python=$(cd "$start_dir" && realpath -s "$python")
out=$(cd "$start_dir" && mkdir -p "${1:-$root/bench/results}" && cd "${1:-$root/bench/results}" && pwd) || exit 1
log=$out/gpu-check.log
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH=$root:$root/python PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TMPDIR=$scratch TRITON_CACHE_DIR=$scratch/triton
PATH=$(dirname "$("$python" -c 'import sys; print(sys.executable)')"):$PATH:/usr/local/cuda/bin
export PATH device python scratch
exec > >(tee "$log") 2>&1

"$python" - <<'CODE' || exit 1
import importlib.util
import os
import sys

if sys.version_info < (3, 11):
    sys.exit(f"error: Python 3.11 or later is needed, this is {sys.version.split()[0]}")
names = ("torch", "numpy", "transformers", "safetensors", "tqdm", "matplotlib", "triton", "setuptools", "pytest", "hypothesis")
missing = [name for name in names if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"error: not installed for {sys.executable}: {', '.join(missing)}")
import setuptools
import torch

gpu = "no GPU"
if os.environ["device"] == "cuda":
    if not torch.cuda.is_available():
        sys.exit(f"error: torch {torch.__version__} sees no GPU (--cpu runs the small form)")
    gpu = torch.cuda.get_device_name()
    with open(os.path.join(os.environ["scratch"], "arch"), "w") as file:
        print("%d%d-real" % torch.cuda.get_device_capability(), file=file)
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"error: setuptools 77 or later is needed, this is {setuptools.__version__}")
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}, {gpu}")
CODE
grep -E '^Mem(Total|Available)' /proc/meminfo

# Seconds that a row may take are cut to what is left of the whole check's.
deadline=470
: > "$scratch/rows"
# row NAME SECONDS COMMAND...: runs it and notes how it ended; a failure does not stop the others. Out of time, it is
# interrupted, so that pytest still reports what it has.
row() {
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    [ "$limit" -lt $((deadline - start)) ] || limit=$((deadline - start))
    if [ "$limit" -lt 5 ]; then
        echo "=== $name: not run, no time is left"
        status=124
    else
        echo "=== $name (at most $limit s): $*"
        timeout --signal=INT --kill-after=10 "$limit" env --default-signal=INT "$@" || status=$?
        echo "=== $name: status $status, $((SECONDS - start)) s"
    fi
    echo "$name $status $((SECONDS - start))" >> "$scratch/rows"
    "$python" bench/collect_gpu_check.py "$scratch" "$SECONDS" "$out/gpu-check.json"
    return "$status"
}
background=()
# beside FUNCTION ARGUMENTS...: a row beside others, only where no time is measured. Its output comes in one piece.
beside() {
    {
        "$@" > "$scratch/$BASHPID.out" 2>&1
        cat "$scratch/$BASHPID.out"
    } &
    background+=($!)
}
build() {
    DISTZO2_CUDA=1 CUDAARCHS=$(cat "$scratch/arch") "$python" setup.py --quiet build_ext --inplace
}
# Of a test that is skipped the log gives the reason; if all of a file are, it fails.
driver_tests() {
    local test status=0
    cmake --build build/core --target host_pool_test copy_engine_cuda_test training_stress_test || return 1
    for test in host_pool_test copy_engine_cuda_test "training_stress_test cuda_"; do
        # shellcheck disable=SC2086
        DISTZO2_TEST_DRIVER=real DISTZO2_STRESS_STEPS=200 build/core/tests/$test || status=1
    done
    return "$status"
}
describe_machine() {
    PYTHONPATH=$PYTHONPATH:bench "$python" -c 'import json, bench_common; print(json.dumps(bench_common.machine()))' \
        > "$scratch/machine.json"
}
export -f build driver_tests
pytest=("$python" -m pytest -q -p no:cacheprovider)
spread=()
"$python" -c 'import xdist' 2> /dev/null && [ "$device" = cuda ] && spread=(-n 8 --dist worksteal)
normals=() large=() kernels=() signal=() copies=(--rounds 5 --mib 64,256 --total-mib 2048) item=()
if [ "$device" = cpu ]; then
    normals=(--backends reference --log2 20)
    large=(--model tiny --tokens 32 --batches 1,2 --probes 4 --repeats 2)
    kernels=(--dtypes bfloat16)
    signal=(--layers 1 --batch 1 --tokens 16 --probes 2)
    copies=(--rounds 2 --mib 4 --total-mib 32 --skip-disk)
    item=(--mib 16)
fi
bench() { # bench NAME LIMIT SCRIPT ARGUMENTS...: a row whose figures are in NAME.json
    local name=$1 limit=$2 script=$3
    shift 3
    row "$name" "$limit" "$python" "bench/$script.py" "$@" --device "$device" --json "$scratch/$name.json"
}
large_step() { # contenders share a file, and have a process each
    local contender=$1 limit=$2
    shift 2
    row "step-$contender" "$limit" "$python" bench/bench_large_step.py "$@" "${large[@]}" --device "$device" \
        --json "$scratch/large_step.json"
}
tests() { # tests NAME LIMIT ARGUMENTS...
    local name=$1 limit=$2
    shift 2
    OMP_NUM_THREADS=2 row "$name" "$limit" "${pytest[@]}" "$@" "${spread[@]}" --junit-xml="$scratch/$name.xml"
}
sanitizer() { # sanitizer TOOL LIMIT TESTS...
    local tool=$1 limit=$2
    shift 2
    row "$tool" "$limit" compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 9 --print-limit 20 \
        "${pytest[@]}" "$@"
}

if [ "$device" = cuda ]; then
    for tool in nvcc cmake c++; do
        command -v "$tool" > /dev/null || { echo "error: $tool not found"; exit 1; }
    done
    row build 200 bash -c build || { echo "error: nothing else can run without the build"; exit 1; }
    describe_machine
    bench ranks-nccl 50 check_ranks --backend nccl --timeout 45 # alone, since it watches the GPU's free memory
    beside tests cuda-tests 90 -m cuda tests
else
    describe_machine
    beside tests core-tests 90 tests/core/test_embedding.py
fi
beside bench ranks-gloo 90 check_ranks --backend gloo --timeout 85
bench normals 40 check_normals "${normals[@]}"
wait "${background[@]}"
large_step resident 75 bare resident
large_step streamed 75 streamed
large_step zo2 60 zo2
bench signal 40 check_signal "${signal[@]}"
bench kernels 60 bench_kernels --quick "${kernels[@]}"
bench copies 40 bench_copy "${copies[@]}"
bench item 25 bench_item "${item[@]}"
background=()
if [ "$device" = cuda ]; then
    native=tests/core/test_kernels.py::test_native triton=tests/core/test_triton.py
    beside sanitizer memcheck 90 "$native"_{noise,in_place,materialize}"[cuda]"
    beside sanitizer racecheck 90 "$triton::test_noise" "$triton::test_materialize[0]"
    beside row cpp-driver 90 bash -c driver_tests
    tests python-tests 300 -m "not slow and not cuda" tests # takes what time is left
    wait "${background[@]}"
else
    tests python-tests 60 tests/test_rooms.py tests/test_files.py
fi

"$python" bench/collect_gpu_check.py "$scratch" "$SECONDS" "$out/gpu-check.json" --draw
status=$?
echo "log: $log"
exit "$status"
