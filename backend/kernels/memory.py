"""Scratch memory of plans: of their own, or a part of what an engine reserved for all of them.

Plans and layers run one after the other, so all of them take the same bytes in turn.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Tensors begin at multiples of it.
ALIGNMENT = 256


class Workspace:
    """Device memory of a fixed size, taken when it is first asked for."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self._buffer: Tensor | None = None

    def grow(self, size: int) -> None:
        """Hold at least `size` bytes from now on."""
        self.size = max(self.size, size)

    @property
    def buffer(self) -> Tensor:
        if self._buffer is None or self._buffer.numel() < self.size:
            self._buffer = None
            self._buffer = torch.empty(self.size, dtype=torch.uint8, device=self.device)
        return self._buffer


class Memory:
    """Where a plan's scratch comes from, one tensor after the other."""

    def __init__(self, device: torch.device, workspace: Workspace | None = None) -> None:
        self.device, self.workspace = device, workspace
        self.used = 0  # bytes

    def restart(self) -> None:
        """What was taken before is not in use any more."""
        self.used = 0

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Raises MemoryError past the end of a workspace: plans must be cut before."""
        size = aligned(math.prod(shape) * dtype.itemsize)
        begin, self.used = self.used, self.used + size
        if self.workspace is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        if self.used > self.workspace.size:
            raise MemoryError(
                f"a plan needs {self.used} bytes of scratch, {self.workspace.size} are reserved"
            )
        part = self.workspace.buffer[begin : begin + math.prod(shape) * dtype.itemsize]
        return part.view(dtype).view(shape)


def aligned(size: int) -> int:
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
