"""The CPU path: PyTorch for matrix products, numba for what has no matrix form."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numba


def _cache_folder() -> str:
    """Where compiled kernels are kept: a folder for exactly these sources, in this place.

    numba notices a change of the file that holds a function, not of the helpers that it inlines.
    """
    digest = hashlib.sha256(__file__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    default = Path.home() / ".cache" / "express-vllm"
    root = Path(os.environ.get("EXPRESS_VLLM_CACHE", default))
    return str(root / "numba" / digest.hexdigest()[:16])


def compiled() -> bool:
    """Whether kernels of exactly these sources were compiled on this machine before."""
    return Path(numba.config.CACHE_DIR).exists()


if not os.environ.get("NUMBA_CACHE_DIR"):
    numba.config.CACHE_DIR = _cache_folder()
