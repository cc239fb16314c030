"""What the backend asks of a GPU: scratch memory that is counted before the cache gets the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..device import softmax_of
from ..kernels.constants import Model
from ..kernels.scratch import Side
from .memory import EngineMemory
from .path import GpuPath

if TYPE_CHECKING:
    from ..device import Layer


class GpuDevice:
    def __init__(self, layer: Layer, vllm_config: Any) -> None:
        self._layer = layer
        self.memory = EngineMemory.of(vllm_config)
        name, dtype = vllm_config.cache_config.cache_dtype, vllm_config.model_config.dtype
        itemsize = (dtype if name == "auto" else getattr(torch, name)).itemsize
        group_size = layer.num_heads // layer.num_kv_heads
        self.memory.make_room(
            Side(
                Model(layer.head_size, group_size, itemsize, block_size=0), layer.num_kv_heads,
                self.memory.device,
            )
        )  # fmt: skip
        self._scratch = self.memory.decode_scratch(layer.num_heads, layer.head_size)

    def reserve(self, query: Tensor) -> None:
        if query.is_cuda:
            self.memory.reserve()

    def path(self, layer: int) -> GpuPath:
        of = self._layer
        return GpuPath(layer, of.first_kv_head, softmax_of(of), self._scratch)
