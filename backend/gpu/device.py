"""What the backend asks of a GPU: scratch memory that is counted before the cache gets the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from express_vllm.platforms.common import server_config

from ..kernels.decode import DecodeScratch
from .metadata import COMPACTION_SLOTS
from .path import GpuPath, decode_scratch

if TYPE_CHECKING:
    from ..attention import ExpressImpl

#: Bytes of a compaction launch beside its lists: scores, moving rows.
COMPACTION_BYTES = 512 << 20


class Device:
    def __init__(self, impl: ExpressImpl, vllm_config: Any) -> None:
        self.impl = impl
        scheduler = vllm_config.scheduler_config
        length = vllm_config.model_config.max_model_len
        config = server_config(vllm_config)
        self.cap = config.memory_cap(length)
        if config.wide_layers:
            self.cap = min(self.cap * config.wide_factor, length)
        self.tokens = scheduler.max_num_batched_tokens
        self.scratch: DecodeScratch = decode_scratch(
            scheduler.max_num_seqs, impl.num_heads, impl.head_size, self.cap,
            torch.get_default_device(),
        )  # fmt: skip

    def reserve(self, query: Tensor) -> None:
        """Take and give back the most scratch that a step needs, while memory is profiled.

        A chunk's dense copy holds its old slots and its tokens, at most twice over
        (metadata.of_like_size), and lists of slots; a compaction has lists too.
        """
        row = self.impl.num_kv_heads * 2 * self.impl.head_size * query.element_size()
        size = 2 * (self.cap + self.tokens) * row + COMPACTION_BYTES + 2 * 4 * COMPACTION_SLOTS
        if query.is_cuda:
            torch.empty(size, dtype=torch.uint8, device=query.device)

    def path(self, layer: int) -> GpuPath:
        impl = self.impl
        return GpuPath(layer, impl.first_kv_head, impl.scale, self.scratch)
