"""What only a GPU with CuPy can show: real streams, real copies, CuPy's own kernels."""
