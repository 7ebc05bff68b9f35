#!/usr/bin/env bash
# Builds the wheel, installs it away from the checkout and runs it there; then checks that an install with build
# isolation, where pip hides the torch in use, stops and says what to add. Usage: tools/check_package.sh PYTHON
set -euo pipefail
python=$(realpath -s "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
pip=("$python" -m pip --quiet --disable-pip-version-check)

cd "$root"
rm -rf build/lib.* build/bdist.*
"${pip[@]}" wheel --no-build-isolation --no-deps --wheel-dir "$scratch/wheel" .
"${pip[@]}" install --no-deps --target "$scratch/site" "$scratch"/wheel/distzo2-*.whl

cd "$scratch"
export PYTHONPATH="$scratch/site"
"$python" - "$scratch/site" <<'CODE'
import sys
from importlib import resources

import distzo2
import distzo2_core

for package in (distzo2, distzo2_core):
    assert package.__file__.startswith(sys.argv[1]), package.__file__
for package, name in ((distzo2, "py.typed"), (distzo2_core, "py.typed"), (distzo2_core, "_C.pyi")):
    assert resources.files(package).joinpath(name).is_file(), name
noise = distzo2_core.normal(8, seed=1, step=2, param=3)
assert noise.shape == (8,)
print("wheel:", distzo2_core.build_info())
CODE
"$scratch/site/bin/distzo2" --help > /dev/null

cd "$root"
if "${pip[@]}" install --no-deps --target "$scratch/isolated" . > "$scratch/isolated.log" 2>&1; then
    echo "error: an isolated build went through, against a torch that is not the one in use"
    exit 1
fi
grep -m 1 -- "error: .*--no-build-isolation" "$scratch/isolated.log" || { cat "$scratch/isolated.log"; exit 1; }
