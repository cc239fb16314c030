"""Triton kernels of the GPU path; `reference.py` beside them says in plain torch what they compute."""
