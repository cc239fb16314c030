"""The CPU path: PyTorch for matrix products, numba for what has no matrix form."""
