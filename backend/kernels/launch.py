"""Kernels that are compiled once for a model, and launches that skip Triton's binding of arguments,
which takes the host about 100 us.

A kernel's arguments come in named tuples of tensors, integers and floats (`arguments.py`), its
constants in one more, the last parameter.  Triton's own binding would take integers' types from
their values and compile anew for those that are 1 or multiples of 16; ours are counts that differ
from batch to batch, so the types are those that the tuples declare, and only constants, dtypes and
the alignment of pointers choose what is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource

_compiled: dict[tuple, Any] = {}
_INTERPRETED = triton.knobs.runtime.interpret
#: Declared types of scalars, as Triton names them.
_SCALARS = {"tl.int32": "i32", "tl.int64": "i64", "float": "fp32"}
_ALIGNED = [["tt.divisibility", 16]]


class Launch(NamedTuple):
    """How a variant of a kernel is compiled: its constants, and Triton's options."""

    constants: tuple = ()
    warps: int = 4
    stages: int = 3
    registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        found = {"num_warps": self.warps, "num_stages": self.stages}
        return {**found, "maxnreg": self.registers} if self.registers else found


def kernel(function: Callable) -> Any:
    """`triton.jit` of a function that `launch` launches."""
    return triton.jit(function)


def source(kernel: Any, arguments: tuple, constants: tuple) -> ASTSource:
    """What Triton compiles for such arguments: theirs are all parameters but, if there are
    constants, the last one."""
    names, notes = kernel.arg_names, kernel.fn.__annotations__
    given = zip(names, arguments, strict=not constants)
    signature = {name: _type(value, notes.get(name, "")) for name, value in given}
    constexprs = {}
    if constants:
        signature[names[-1]] = "constexpr"
        constexprs[names[-1]] = type(constants)(*map(tl.constexpr, constants))
    attrs = dict.fromkeys(_aligned(arguments), _ALIGNED)
    return ASTSource(kernel, signature, constexprs, attrs)


def _type(value: Any, note: Any) -> Any:
    """Triton's type of an argument whose annotation is `note`; of a tuple, a tuple of them."""
    if isinstance(value, Tensor):
        return "*" + triton.runtime.jit.type_canonicalisation_dict[str(value.dtype).split(".")[-1]]
    if isinstance(value, tuple):
        notes = type(value).__annotations__.values()
        return type(value)(*map(_type, value, notes))
    return _SCALARS[getattr(note, "__forward_arg__", note)]


def _aligned(arguments: tuple, path: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Where pointers to multiples of 16 bytes are in nested tuples."""
    for i, value in enumerate(arguments):
        if isinstance(value, tuple):
            yield from _aligned(value, (*path, i))
        elif isinstance(value, Tensor) and value.data_ptr() % 16 == 0:
            yield (*path, i)


def _tensors(arguments: tuple) -> Iterator[Tensor]:
    for value in arguments:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple, variant: Launch,
    stream: torch.cuda.Stream | None = None,
) -> None:  # fmt: skip
    """Launch `variant` of `kernel` on `arguments`, in the order of its parameters."""
    given = (*arguments, variant.constants) if variant.constants else arguments
    if _INTERPRETED:
        kernel[grid](*given, **variant.options)
        return
    tensors = list(_tensors(arguments))
    device = tensors[0].device.index
    key = (kernel, device, variant, *[(x.dtype, x.data_ptr() & 15) for x in tensors])
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = _compiled[key] = triton.compile(
            source(kernel, arguments, variant.constants),
            target=triton.runtime.driver.active.get_current_target(), options=variant.options,
        )  # fmt: skip
    # As Triton's `run` does, without hooks.
    raw = stream.cuda_stream if stream else triton.runtime.driver.active.get_current_stream(device)
    compiled.run(
        *(*grid, 1, 1)[:3], raw, compiled.function, compiled.packed_metadata, None, None, None,
        *given,
    )  # fmt: skip
