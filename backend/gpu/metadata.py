"""A step's plan on the GPU, built from token counts that the host knows.

Requests with one new token come first in a Model Runner V2 batch and are *decodes*: what the
kernels need to know about them lies in tables at fixed addresses, so that a CUDA graph can be
replayed.  Events of decodes run here, before the forward pass, on the pages of all layers at once.
Requests with more tokens are *chunks*: layers work them off, events included, one by one.
Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from express_vllm.softmax import Softmax

from ..batch import Batch
from ..chunk import Chunk
from ..indices import layer_index
from ..kernels.constants import QUERY_ROWS, Model
from ..kernels.events import Kind
from ..kernels.memory import Memory
from ..kernels.plan import StepPlan
from ..kernels.scratch import Side, chunks_fit, cut, decodes_fit
from ..kernels.span import Extent, Span
from ..kernels.step import compact_pages
from ..pages import slot_pages
from .decodes import DecodeRows, DecodeTables
from .joint import joint_softmax, require_alike
from .memory import EngineMemory
from .timer import CompactionTimer


@dataclass
class ExpressMetadata:
    """The step's plan: decodes are batch rows [0, decodes.count).

    `chunks` holds plans that run in this order, each within the engine's scratch memory.
    """

    table: Tensor  # int32 [R, blocks]
    decodes: DecodeTables | None
    timer: CompactionTimer
    chunks: list[StepPlan] = field(default_factory=list)

    @property
    def idle(self) -> bool:
        """A dummy batch: nothing is written, nothing attended."""
        return self.decodes is None and not self.chunks


class ExpressMetadataBuilder(AttentionMetadataBuilder[ExpressMetadata]):
    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.wide = kv_cache_spec.factor > 1
        self._rows = DecodeRows(self.wide, vllm_config.scheduler_config.max_num_seqs, device)
        self._timer = CompactionTimer(device)
        require_alike([layer.impl for layer in self._layers()])

    def _layers(self) -> list[Any]:
        context = self.vllm_config.compilation_config.static_forward_context
        return [context[name] for name in self.layer_names]

    @cached_property
    def layers(self) -> Layers:
        """Known once the caches are bound, which is after this builder is made."""
        return Layers.of(self._layers())

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> ExpressMetadata:
        batch = Batch.of(common_prefix_len, common_attn_metadata, self.wide)
        table, count = common_attn_metadata.block_table_tensor, common_attn_metadata.num_reqs
        if not batch.names:
            single = common_attn_metadata.max_query_len == 1
            return ExpressMetadata(table, self._rows.idle(count) if single else None, self._timer)
        self.layers.memory.begin()
        decodes = _leading(batch)
        index = common_attn_metadata.req_idx[:decodes]
        last = self._rows.update(index, batch.names, batch.budgets, batch.starts[:decodes])
        self._timer.report()
        due = batch.decodes[batch.due(last)].tolist()
        if due:
            with self._timer.span():
                self._compact([batch.chunk(r) for r in due], table)
        padded = decodes if decodes < len(batch.names) else count
        tables = self._rows.tables(index, batch.stops[:decodes], padded) if padded else None
        return ExpressMetadata(table, tables, self._timer, self._chunks(batch))

    def _compact(self, due: Iterable[Chunk], table: Tensor) -> None:
        layers = self.layers
        spans = [Span.of(chunk, compacting=True) for chunk in due]
        for plan in self._plans(spans, decodes_fit(layers.side, layers.memory.limit), 0):
            compact_pages(
                plan, layers.cache, layers.offsets, layers.ids, table, layers.first_kv_head,
                layers.softmax, layers.group_size,
            )  # fmt: skip

    def _chunks(self, batch: Batch) -> list[StepPlan]:
        spans = [Span.of(batch.chunk(r)) for r in batch.chunks.tolist()]
        if not spans:
            return []
        layers = self.layers
        return self._plans(
            spans, chunks_fit(layers.side, layers.memory.limit), QUERY_ROWS // layers.group_size
        )

    def _plans(
        self, spans: Sequence[Span], fits: Callable[[Extent, Kind | None], bool], tile: int
    ) -> list[StepPlan]:
        workspace = self.layers.memory.workspace
        return [
            StepPlan.of(some, self.device, tile, Memory(self.device, workspace))
            for some in cut(spans, fits)
        ]


def _leading(batch: Batch) -> int:
    """How many decodes there are.  Raises NotImplementedError if a chunk comes before one: Model
    Runner V2 sorts its batches."""
    count = len(batch.decodes)
    if count and batch.decodes[-1] >= count:
        raise NotImplementedError("express runs no batch whose decodes do not come first")
    return count


@dataclass
class Layers:
    """The layers of one builder: their pages as offsets from the first one's."""

    cache: Tensor  # [blocks, KV heads, slots of a page, 2 d] of the first layer
    offsets: Tensor  # int64 [L], elements
    ids: Tensor  # int64 [L], global layer indices
    kv_heads: int
    group_size: int  # query heads of a KV head
    first_kv_head: int
    softmax: Softmax
    memory: EngineMemory

    @property
    def side(self) -> Side:
        return Side(Model.of(self.cache, self.group_size), self.kv_heads, self.cache.device)

    @classmethod
    def of(cls, layers: Sequence[Any]) -> Layers:
        impl = layers[0].impl
        cache = slot_pages(layers[0].kv_cache, impl.num_kv_heads)
        starts = [layer.kv_cache.data_ptr() - cache.data_ptr() for layer in layers]
        offsets = [start // cache.element_size() for start in starts]
        ids = [layer_index(layer.layer_name) for layer in layers]
        return cls(
            cache, torch.tensor(offsets, dtype=torch.int64).to(cache.device),
            torch.tensor(ids, dtype=torch.int64).to(cache.device), impl.num_kv_heads,
            impl.num_heads // impl.num_kv_heads, impl.first_kv_head,
            joint_softmax([layer.impl for layer in layers]), impl._device.memory,
        )  # fmt: skip
