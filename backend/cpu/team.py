"""Run compiled tasks on PyTorch's own OpenMP team.

vLLM pins PyTorch's OpenMP threads to cores.  A second pool (numba's) would inherit the main
thread's pinning or fight the spinning team for the same cores, so kernels are launched through
`GOMP_parallel` of the OpenMP runtime that PyTorch already loaded.  Without it they run serially.
"""

from __future__ import annotations

import ctypes
import glob
import os
from collections.abc import Callable
from typing import Any

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

#: numba signature of a team kernel: its only argument points at an int64 parameter block.
SIGNATURE = types.void(types.voidptr)
#: Words 0 and 1 of a parameter block: the next unclaimed task and the number of tasks.
NEXT, TASKS, HEADER = 0, 1, 2


@intrinsic
def claim(typingctx, pointer):
    """Atomically take the next task number from the parameter block at `pointer` (word 0)."""

    def codegen(context, builder, signature, args):
        word = builder.bitcast(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", word, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.voidptr), codegen


def run(kernel: Callable[..., None], tasks: int, words: list[int]) -> None:
    """Run `kernel` (a numba cfunc of `SIGNATURE`) until its `tasks` tasks are done.

    `words` are pointers and sizes, as int64, that the kernel reads after the header; the caller
    keeps what they point at alive.
    """
    if tasks == 0:
        return
    block = np.array([0, tasks, *words], dtype=np.int64)
    threads = min(torch.get_num_threads(), tasks)
    if threads > 1 and _parallel is not None:
        _parallel(kernel.address, block.ctypes.data, threads, 0)  # type: ignore[attr-defined]
    else:
        kernel.ctypes(block.ctypes.data)  # type: ignore[attr-defined]
