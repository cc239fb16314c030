"""Run compiled tasks on PyTorch's own OpenMP team.

vLLM pins PyTorch's OpenMP threads to cores.  A second pool (numba's) would inherit the main
thread's pinning or fight the spinning team for the same cores, so kernels are launched through
`GOMP_parallel` of the OpenMP runtime that PyTorch already loaded.  Without it they run serially.
"""

from __future__ import annotations

import ctypes
import glob
import operator
import os
import struct
from collections.abc import Callable
from typing import Any, get_type_hints

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic


def _find_parallel() -> Any | None:
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    for name in [None, *sorted(glob.glob(os.path.join(folder, "lib[gi]omp*.so*")))]:
        try:
            function = ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
        return function
    return None


_parallel = _find_parallel()

#: numba signature of a team kernel: its only argument points at a record of its parameters.
SIGNATURE = types.void(types.voidptr)


class Record:
    """What a kernel reads: the next unclaimed task, the number of tasks, then its parameters.

    parameters: a class that declares them, of type int (addresses among them) or float.  `dtype` is
    the record as compiled code names it; one is packed in the time that a list of words takes.
    """

    def __init__(self, parameters: type) -> None:
        kinds = get_type_hints(parameters)
        fields = {"next_task": int, "tasks": int, **kinds}
        words = {int: np.int64, float: np.float32}
        self.dtype = np.dtype([(name, words[kind]) for name, kind in fields.items()], align=True)
        codes = "".join("q" if kind is int else "f" for kind in fields.values())
        self._struct = struct.Struct(f"@{codes}0q")  # as NumPy aligns
        self._in_order = operator.itemgetter(*kinds)

    def pack(self, tasks: int, values: dict[str, Any]) -> np.ndarray:
        """Raises KeyError for a parameter that is missing."""
        packed = self._struct.pack(0, tasks, *self._in_order(values))
        return np.frombuffer(bytearray(packed), np.uint8)


@intrinsic
def claim(typingctx, pointer):
    """Atomically take the next task number from the record at `pointer`: its first word."""

    def codegen(context, builder, signature, args):
        word = builder.bitcast(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", word, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.voidptr), codegen


def run(kernel: Callable[..., None], record: Record, tasks: int, values: dict[str, Any]) -> None:
    """Run `kernel` (a numba cfunc of `SIGNATURE`) until its `tasks` tasks are done.

    values: the record's parameters; the caller keeps what addresses point at alive.
    """
    if tasks == 0:
        return
    block = record.pack(tasks, values)
    threads = min(torch.get_num_threads(), tasks)
    if threads > 1 and _parallel is not None:
        _parallel(kernel.address, block.ctypes.data, threads, 0)  # type: ignore[attr-defined]
    else:
        kernel.ctypes(block.ctypes.data)  # type: ignore[attr-defined]
