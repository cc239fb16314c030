"""Kernel launches without Triton's binding of arguments, which takes the host about 100 us.

A compiled kernel is looked up by what Triton specialises it for: the constants, the types, and
whether an integer is 1, a multiple of 16 or wide, or a pointer aligned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_compiled: dict[tuple, Any] = {}


def _kind(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if isinstance(argument, int):
        wide = not -(1 << 31) <= argument < 1 << 31
        return (argument % 16 == 0) + 2 * (argument == 1) + 4 * wide
    return type(argument)


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple, constants: tuple = (), *, warps: int,
    stages: int = 3, registers: int | None = None, stream: torch.cuda.Stream | None = None,
) -> None:  # fmt: skip
    """Launch `kernel` on (arguments, constants), in the order of its parameters."""
    options = {"num_warps": warps, "num_stages": stages}
    if registers:
        options["maxnreg"] = registers
    if not torch.cuda.is_available():  # the interpreter
        kernel[grid](*arguments, *constants, **options)
        return
    device = arguments[0].device.index
    key = (id(kernel), device, warps, stages, registers, constants, *map(_kind, arguments))
    compiled = _compiled.get(key)
    if compiled is None:
        with torch.cuda.stream(stream):
            _compiled[key] = kernel[grid](*arguments, *constants, **options)
        return
    compiled[(*grid, 1, 1)[:3]](
        *arguments, *constants, stream=stream.cuda_stream if stream else None
    )
