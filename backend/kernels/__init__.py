"""Triton kernels of the GPU path; `reference.py` says in plain torch what they compute."""
