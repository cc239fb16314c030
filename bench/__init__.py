"""Benchmarks: each prints a table and stores it with its hardware, versions, commit and command."""

from importlib.util import find_spec
from pathlib import Path

import express_vllm

# In the repository's root `express_vllm` is the folder there.  `backend` and `scheduler`, which an
# installation puts into it, lie beside it (setup.py).
if find_spec("express_vllm.backend") is None:
    express_vllm.__path__.append(str(Path(__file__).parents[1]))
