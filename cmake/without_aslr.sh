#!/bin/sh
# Runs a command with fixed addresses where the system allows it: the thread sanitizer of GCC 12 cannot map its shadow
# memory on kernels that randomise 32 bits of the mmap base.
if setarch "$(uname -m)" --addr-no-randomize true 2>/dev/null; then
    exec setarch "$(uname -m)" --addr-no-randomize "$@"
fi
exec "$@"
