"""The records of `tables.py` as the kernels see them: offsets in words from a record's first one.

`tl.load(request + REQUEST.old)` reads a field, record i begins at `i * REQUEST.words`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl

from . import tables


class Record(tl.constexpr):
    """Offsets of a record's fields, as attributes.

    One constant as a whole: Triton's key of a compiled kernel holds the constants that its source
    names, but not attributes of a module.
    """

    def __init__(self, dtype: np.dtype) -> None:
        words = dtype.itemsize // tables.word(dtype).itemsize
        constants = {**tables.offsets(dtype), "words": words}
        super().__init__(SimpleNamespace(**{n: tl.constexpr(at) for n, at in constants.items()}))

    def __getattr__(self, name: str) -> Any:
        if name == "value" or name.startswith("__"):  # not there yet while a copy is made
            raise AttributeError(name)
        return getattr(self.value, name)


REQUEST, EVENT, ROUND, OP, TILE = map(
    Record, (tables.REQUEST, tables.EVENT, tables.ROUND, tables.OP, tables.TILE)
)
