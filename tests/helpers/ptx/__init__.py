"""Runs PTX on the CPU. `parser` reads its text, `translate` makes Python functions of it, `machine` executes a kernel
on NumPy arrays with one lane a thread, `memory` holds what it may touch; `cuda_kernels` and `triton_kernels` launch the
project's own kernels through it, and `cases` calls them."""
