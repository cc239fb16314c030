"""The KV-cache spec of a layer under express: ordinary pages, bounded per request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, replace_as

from express_vllm.platforms.common import server_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, kw_only=True)
class ExpressSpec(AttentionSpec):
    """Pages [KV heads, block size, 2 * head size].

    `factor` times as many slots a page in a wide layer.  vLLM wants one block size in all layers of
    a block table, so there `num_kv_heads` is multiplied, and `backend.pages` undoes it.
    """

    factor: int = 1

    def widened(self, factor: int) -> ExpressSpec:
        return replace_as(self, ExpressSpec, factor=factor, num_kv_heads=self.num_kv_heads * factor)

    @classmethod
    def of(cls, spec: AttentionSpec) -> ExpressSpec:
        if isinstance(spec, cls):  # vLLM asks once for the layer and once for the runner
            return spec
        return replace_as(spec, cls, drop={"sliding_window", "attention_chunk_size", "non_causal"})

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of the largest budget that the operator allows, not of the maximal length."""
        cap = server_config(vllm_config).memory_cap(vllm_config.model_config.max_model_len)
        return cdiv(cap, self.block_size) * self.page_size_bytes

    @property
    def prefix_cacheable(self) -> bool:
        return False

    @property
    def uses_slot_mapping(self) -> bool:
        return False
