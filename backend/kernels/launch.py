"""Kernels that are compiled once for a model, and launches that skip Triton's binding of arguments,
which takes the host about 100 us.

Triton specialises a kernel for integers that are 1 or multiples of 16.  Ours are counts that differ
from batch to batch, so only constants, types and pointers' alignment choose what is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

_compiled: dict[tuple, Any] = {}
_INTERPRETED = triton.knobs.runtime.interpret


def kernel(function: Callable) -> Any:
    """`triton.jit` of a function whose integer parameters are annotated and specialise nothing."""
    notes = function.__annotations__.items()
    integers = [name for name, kind in notes if kind in ("tl.int32", "tl.int64")]
    return triton.jit(function, do_not_specialize=integers)


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple, constants: tuple = (), *, warps: int,
    stages: int = 3, registers: int | None = None, stream: torch.cuda.Stream | None = None,
) -> None:  # fmt: skip
    """Launch `kernel` on (arguments, constants), in the order of its parameters."""
    options = {"num_warps": warps, "num_stages": stages}
    if registers:
        options["maxnreg"] = registers
    if _INTERPRETED:
        kernel[grid](*arguments, *constants, **options)
        return
    device = arguments[0].device.index
    kinds = [(a.dtype, a.data_ptr() & 15) for a in arguments if type(a) is Tensor]
    key = (kernel, device, warps, stages, registers, constants, *kinds)
    compiled = _compiled.get(key)
    if compiled is None:
        with torch.cuda.stream(stream):
            _compiled[key] = kernel[grid](*arguments, *constants, **options)
        return
    # As Triton's `run` does, without hooks.
    raw = stream.cuda_stream if stream else triton.runtime.driver.active.get_current_stream(device)
    compiled.run(
        *(*grid, 1, 1)[:3], raw, compiled.function, compiled.packed_metadata, None, None, None,
        *arguments, *constants,
    )  # fmt: skip
