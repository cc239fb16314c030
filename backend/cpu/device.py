"""What the backend asks of the CPU: kernels loaded early, one path per layer."""

from __future__ import annotations

import functools
import importlib
import logging
import time
from typing import TYPE_CHECKING

from torch import Tensor

from ..device import softmax_of
from . import compiled

if TYPE_CHECKING:
    from ..device import Layer
    from .path import CpuPath

logger = logging.getLogger("vllm.express")


class CpuDevice:
    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        load_kernels(capped=bool(layer.soft_cap))

    def reserve(self, query: Tensor) -> None:
        """Nothing: memory is not profiled on CPUs."""

    def path(self, layer: int) -> CpuPath:
        from .path import CpuPath  # compiled by now: `load_kernels` reports how long it takes

        of = self._layer
        return CpuPath(
            layer, of.first_kv_head, of.num_kv_heads, of.num_heads // of.num_kv_heads,
            of.head_size, softmax_of(of),
        )  # fmt: skip


@functools.cache
def load_kernels(capped: bool) -> None:
    """Compile or load the kernels now, not in the first request; `capped`: those of logits with a
    soft cap, too."""
    start = time.monotonic()
    if not compiled():
        logger.info("express: compiling the CPU kernels, once (half a minute) ...")
    importlib.import_module(f"{__package__}.path")
    if capped:
        importlib.import_module(f"{__package__}.decode").kernels(capped)
    logger.info("express: CPU kernels ready after %.1f s", time.monotonic() - start)
