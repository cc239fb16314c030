"""The KV-cache spec of a layer under express: ordinary pages, bounded per request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
    replace_as,
)

from express_vllm.conflicts import active, refuse_layer
from express_vllm.layers import ModelLayers
from express_vllm.settings import Settings

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
    def of(cls, spec: KVCacheSpec) -> ExpressSpec:
        """The spec of a plain causal layer.  Raises ConflictError for every other."""
        if type(spec) is cls:  # vLLM asks once for the layer and once for the runner
            return spec
        refuse_layer(_found(spec))
        return replace_as(spec, cls, drop={"sliding_window", "attention_chunk_size", "non_causal"})

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of the largest budget that the operator allows, not of the maximal length."""
        most = Settings.of(vllm_config).most_slots
        return cdiv(most, self.block_size) * self.page_size_bytes

    @property
    def uses_slot_mapping(self) -> bool:
        return False


#: What plain layers may differ in.
_FREE = {
    "block_size", "num_kv_heads", "head_size", "head_size_v", "dtype", "dcp_sharded",
    "max_tp_shards",
}  # fmt: skip
_FIELDS = {
    "sliding_window": "sliding-window and chunked-local layers",
    "attention_chunk_size": "sliding-window and chunked-local layers",
    "non_causal": "prefix-LM and other layers that are not causal",
    "kv_quant_mode": "a KV cache of another type than the model's",
}
_CLASSES = {
    "ChunkedLocalAttentionSpec": "sliding-window and chunked-local layers",
    "SlidingWindowSpec": "sliding-window and chunked-local layers",
    "RSWASpec": "sliding-window and chunked-local layers",
    "SinkFullAttentionSpec": "attention sinks of the model",
    "MLAAttentionSpec": "MLA and sparse attention layers",
    "SlidingWindowMLASpec": "MLA and sparse attention layers",
    "EncoderOnlyAttentionSpec": "cross and encoder attention",
    "CrossAttentionSpec": "cross and encoder attention",
}


def _found(spec: KVCacheSpec) -> Iterator[str]:
    if type(spec) is not FullAttentionSpec:
        name = type(spec).__name__
        yield _CLASSES.get(name, f"a KV cache of class {name}")
        return
    values = {f.name: getattr(spec, f.name) for f in fields(spec) if f.name not in _FREE}
    yield from active(values, {f.name: f.default for f in fields(spec)}, _FIELDS)
    if spec.head_size_v != spec.head_size:
        yield "values of another size than keys"


#: Caches of layers that are bounded by themselves, beside those of express.
_BOUNDED = (SlidingWindowSpec, ChunkedLocalAttentionSpec, MambaSpec)


def check_layers(specs: Mapping[int, KVCacheSpec], layers: ModelLayers) -> None:
    """Raises ConflictError if the layers that a rank has built, `specs` by index, are not those
    that the model's configuration names: budgets were decided for these."""
    for index, spec in specs.items():
        grows = index in layers.growing
        if type(spec) is not ExpressSpec if grows else type(spec) not in _BOUNDED:
            refuse_layer(["layers that a model runs on another backend"])
