"""What the backend asks of a GPU: scratch memory that is counted before the cache gets the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.constants import Model
from ..kernels.scratch import Side
from .memory import EngineMemory
from .path import GpuPath

if TYPE_CHECKING:
    from ..attention import ExpressImpl


class Device:
    def __init__(self, impl: ExpressImpl, vllm_config: Any) -> None:
        self.impl = impl
        self.memory = EngineMemory.of(vllm_config)
        name, dtype = vllm_config.cache_config.cache_dtype, vllm_config.model_config.dtype
        itemsize = (dtype if name == "auto" else getattr(torch, name)).itemsize
        group = impl.num_heads // impl.num_kv_heads
        self.memory.make_room(
            Side(
                Model(impl.head_size, group, itemsize, block_size=0), impl.num_kv_heads,
                self.memory.device,
            )
        )  # fmt: skip
        self.scratch = self.memory.decode_scratch(impl.num_heads, impl.head_size)

    def reserve(self, query: Tensor) -> None:
        """Take what a step may need, while memory is profiled."""
        if query.is_cuda:
            self.memory.reserve()

    def path(self, layer: int) -> GpuPath:
        impl = self.impl
        return GpuPath(layer, impl.first_kv_head, impl.scale, self.scratch)
