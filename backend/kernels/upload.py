"""Copies to a device that the host does not wait for."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import tables
from .span import cdiv


def to_device(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copy arrays in one transfer that the host does not wait for; -> flat views of the copy."""
    sizes = [cdiv(max(a.nbytes, 1), 16) * 4 for a in arrays]  # words, so that each is aligned
    host = staging(4 * sum(sizes), device)
    at = 0
    words = host.numpy()
    for array, size in zip(arrays, sizes, strict=True):
        words[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
        at += 4 * size
    copy = host.to(device, non_blocking=True).view(torch.int32)
    return [
        part[: array.nbytes // 4].view(_TYPES[tables.word(array.dtype).type])
        for part, array in zip(copy.split(sizes), arrays, strict=True)
    ]


_TYPES = {np.int32: torch.int32, np.int64: torch.int64, np.float32: torch.float32}


def upload(array: np.ndarray, out: Tensor) -> None:
    """Copy `array` to the device tensor `out`, of its size; the host does not wait."""
    host = staging(array.nbytes, out.device)
    host.numpy()[:] = array.reshape(-1).view(np.uint8)
    out.copy_(host.view(out.dtype), non_blocking=True)


def staging(size: int, device: torch.device) -> Tensor:
    """Bytes on the host, from which a copy to `device` needs no waiting."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
