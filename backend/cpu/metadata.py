"""A step's plan on the CPU: built once on the host from the `Batch`, shared by every layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata

from express_vllm.layout import Event, Layout

from ..batch import Batch
from ..chunk import Chunk
from .compaction import operations
from .decode import DecodeBatch


@dataclass
class Compaction:
    """An event, its operations as records and log w of the slots that it finds, fp32."""

    event: Event
    ops: np.ndarray
    log_weight: np.ndarray

    @classmethod
    def of(cls, layout: Layout, event: Event) -> Compaction:
        weights = log_weights(layout, event.position)
        if weights is None:
            weights = np.zeros(event.live_before, np.float32)
        return cls(event, operations(event), weights)


@dataclass
class Piece:
    """Tokens [start, stop) of a request between two events, after `live` slots of state.

    `bias` holds log w of those slots (None: all weights are 1); `compaction` runs after the piece.
    """

    start: int
    stop: int
    live: int
    bias: np.ndarray | None
    compaction: Compaction | None


@dataclass
class DenseChunk:
    """A chunk, or a decode with an event due: worked off on a dense copy of the request's state.

    `blocks`, int32, is its block-table row.
    """

    chunk: Chunk
    blocks: np.ndarray
    pieces: list[Piece]


@dataclass
class RingWrite:
    """Decode tokens whose query must be kept, int64 [W]: batch rows, slots of the page pool, rows
    of the ring."""

    tokens: np.ndarray
    slots: np.ndarray
    rows: np.ndarray


@dataclass
class ExpressMetadata:
    """The step's plan: decodes on the pages, the rest on dense copies."""

    dense: list[DenseChunk]
    decode: DecodeBatch | None
    ring: RingWrite | None

    @property
    def idle(self) -> bool:
        """A dummy batch: nothing is written, nothing attended."""
        return self.decode is None and not self.dense


def log_weights(layout: Layout, tokens: int) -> np.ndarray | None:
    """log w of every live slot when `tokens` tokens are stored, fp32; None: all weights are 1."""
    if layout.events_done(tokens) == 0:
        return None
    segments = layout.segments(tokens)
    logs = (np.log(2) * np.array([s.log2_weight for s in segments])).astype(np.float32)
    return np.repeat(logs, [s.length for s in segments])


def plan_pieces(layout: Layout, start: int, stop: int) -> list[Piece]:
    """Cut [start, stop) at the events that run while those tokens are processed."""
    pieces, position = [], start
    for event in layout.events(start, stop):
        pieces.append(_piece(layout, position, event.position, Compaction.of(layout, event)))
        position = event.position
    pieces.append(_piece(layout, position, stop, None))
    return pieces


def _piece(layout: Layout, start: int, stop: int, compaction: Compaction | None) -> Piece:
    if start == stop:  # the event runs before the first token of the step: nothing to attend
        return Piece(start, stop, layout.live(start), None, compaction)
    weights = log_weights(layout, start + 1)  # the first token's own slot is the last
    bias = None if weights is None else weights[:-1]
    return Piece(start, stop, layout.live(start + 1) - 1, bias, compaction)


class ExpressMetadataBuilder(AttentionMetadataBuilder[ExpressMetadata]):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.wide = kv_cache_spec.factor > 1
        self.block_size = kv_cache_spec.block_size * kv_cache_spec.factor

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> ExpressMetadata:
        batch = Batch.of(common_prefix_len, common_attn_metadata, self.wide)
        table = common_attn_metadata.block_table_tensor.numpy()
        return plan_batch(batch, table, self.block_size)


def plan_batch(batch: Batch, table: np.ndarray, block_size: int) -> ExpressMetadata:
    """The plan of a batch in layers whose pages hold `block_size` slots; table [R, blocks] int32 is
    the block table."""
    layouts = [batch.layout(r) for r in batch.decodes]
    stops = batch.stops[batch.decodes].tolist()
    last = [x.last_event_position(stop) for x, stop in zip(layouts, stops, strict=True)]
    due = batch.due(np.array(last, np.int64))
    dense = [_dense(batch.chunk(r), table[r]) for r in (*batch.decodes[due], *batch.chunks)]
    steady = [i for i, compacts in enumerate(due.tolist()) if not compacts]
    if not steady:
        return ExpressMetadata(dense, None, None)
    requests, kept = batch.decodes[steady], [(layouts[i], stops[i]) for i in steady]
    tokens = batch.rows[requests].astype(np.int64)
    decode = DecodeBatch.make(
        tokens.tolist(), [layout.live(stop) for layout, stop in kept], table[requests],
        [log_weights(layout, stop) for layout, stop in kept],
    )  # fmt: skip
    rows = np.array([layout.ring_row(stop - 1) for layout, stop in kept])
    starts = np.array([layout.ring_start for layout, _ in kept])
    ring = _ring_write(tokens, rows, starts, table[requests], block_size)
    return ExpressMetadata(dense, decode, ring)


def _dense(chunk: Chunk, blocks: np.ndarray) -> DenseChunk:
    return DenseChunk(chunk, blocks, plan_pieces(chunk.layout, chunk.start, chunk.stop))


def _ring_write(
    tokens: np.ndarray, rows: np.ndarray, starts: np.ndarray, table: np.ndarray, block_size: int
) -> RingWrite | None:
    """Where decodes at batch rows `tokens` [D] keep their queries: in ring rows `rows` [D] (below
    0: nowhere) of rings whose first slots are `starts` [D]."""
    kept = np.flatnonzero(rows >= 0)
    if not len(kept):
        return None
    rows = rows[kept]
    block, slot = np.divmod(starts[kept] + rows // 2, block_size)
    return RingWrite(tokens[kept], table[kept, block].astype(np.int64) * block_size + slot, rows)
