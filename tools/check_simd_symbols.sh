#!/usr/bin/env bash
# Objects compiled for AVX2 or AVX-512 must not define weak symbols (inline functions, templates): the linker keeps one
# copy of each for the whole program, and a CPU without those instructions would then run theirs.
# Usage: tools/check_simd_symbols.sh BUILD_FOLDER
set -euo pipefail
objects=$(find "$1" -name '*_avx2.cpp.o' -o -name '*_avx512.cpp.o')
if [ -z "$objects" ]; then
    [ "$(uname -m)" != x86_64 ] || { echo "error: no AVX objects under $1"; exit 1; }
    echo "no AVX objects on $(uname -m)"
    exit 0
fi
status=0
for object in $objects; do
    # DW.ref.* is a pointer to the exception personality, no code.
    weak=$(nm --demangle --defined-only "$object" | grep -E '^[0-9a-f]+ [WVu] ' | grep -v 'DW\.ref\.' || true)
    if [ -n "$weak" ]; then
        echo "error: $object defines weak symbols:"
        echo "$weak"
        status=1
    else
        echo "ok: $object"
    fi
done
exit "$status"
