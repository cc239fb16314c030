"""What the backend asks of the CPU: kernels loaded early, one path per layer."""

from __future__ import annotations

import functools
import importlib
import logging
import time
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import compiled

if TYPE_CHECKING:
    from ..attention import ExpressImpl
    from .path import CpuPath

logger = logging.getLogger("vllm.express")


class Device:
    def __init__(self, impl: ExpressImpl, vllm_config: Any) -> None:
        self.impl = impl
        load_kernels()

    def reserve(self, query: Tensor) -> None:
        """Nothing: memory is not profiled on CPUs."""

    def path(self, layer: int) -> CpuPath:
        from .path import CpuPath

        impl = self.impl
        group = impl.num_heads // impl.num_kv_heads
        return CpuPath(
            layer, impl.first_kv_head, impl.num_kv_heads, group, impl.head_size, impl.scale
        )


@functools.cache
def load_kernels() -> None:
    """Compile or load the kernels now, not in the first request."""
    start = time.monotonic()
    if not compiled():
        logger.info("express: compiling the CPU kernels, once (half a minute) ...")
    importlib.import_module(f"{__package__}.path")
    logger.info("express: CPU kernels ready after %.1f s", time.monotonic() - start)
