"""Runs PTX on the CPU: `parser` reads its text, `machine` executes a kernel on NumPy arrays with one lane a thread,
`memory` holds what it may touch, and `cuda_kernels` and `triton_kernels` launch the project's own kernels through it."""
