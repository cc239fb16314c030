"""`Plan`: what a step must do, built once on the host and shared by every layer.

Budgets and token counts come from the scheduler; `layout` turns them into slots, so nothing is
read back from a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata

from express_vllm.budget import Budget
from express_vllm.layout import RING_ROWS, Event, Layout

from ..step import current_step, plain_batch
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
class SequencePlan:
    """A request whose step crosses an event or has several tokens.

    `first_token` is the batch row of the token at position `start`; `blocks` its block table row.
    """

    first_token: int
    start: int
    stop: int
    layout: Layout | None
    seed: int
    blocks: np.ndarray
    pieces: list[Piece]


@dataclass
class RingWrite:
    """Decode tokens whose query row must be kept: batch rows, pool slots, rows of the ring."""

    tokens: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


@dataclass
class ExpressMetadata:
    """The step's plan."""

    sequences: list[SequencePlan]
    decode: DecodeBatch | None
    ring: RingWrite


def log_weights(layout: Layout | None, tokens: int) -> np.ndarray | None:
    """log w of every live slot when `tokens` tokens are stored, fp32; None: all weights are 1."""
    if layout is None or layout.events_done(tokens) == 0:
        return None
    segments = layout.segments(tokens)
    logs = (np.log(2) * np.array([s.log2_weight for s in segments])).astype(np.float32)
    return np.repeat(logs, [s.length for s in segments])


def ring_row(layout: Layout, position: int) -> int | None:
    """The ring row that keeps the query at `position`, if the next event scores with it."""
    if not layout.shape.ring:
        return None
    row = position - (layout.next_event_position(position + 1) - RING_ROWS)
    return row if row >= 0 else None


def ring_rows(layout: Layout, start: int, stop: int) -> np.ndarray:
    """`ring_row` of positions [start, stop), int64; below 0: no event scores with it."""
    shape, position = layout.shape, np.arange(start, stop)
    done = np.maximum((position - shape.first_event) // shape.interval + 1, 0)
    return position - (shape.first_event + done * shape.interval - RING_ROWS)


def plan_pieces(layout: Layout | None, start: int, stop: int) -> list[Piece]:
    """Cut [start, stop) at the events that run while those tokens are processed."""
    if layout is None:
        return [Piece(start, stop, start, None, None)]
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
    """Splits a batch into single-token requests without an event and the rest."""

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
        common = common_attn_metadata
        plain_batch(common_prefix_len, common)
        return plan_batch(
            current_step().batch(common),
            common.query_start_loc_cpu.tolist(),
            common.seq_lens.tolist(),
            common.block_table_tensor.numpy(),
            self.block_size,
            self.wide,
        )


def plan_batch(
    budgets: Sequence[Budget | None],
    starts: Sequence[int],
    stops: Sequence[int],
    table: np.ndarray,
    block_size: int,
    wide: bool = False,
) -> ExpressMetadata:
    """The plan of a batch, in wide layers or in ordinary ones, whose pages hold `block_size` slots:
    request r owns batch rows [starts[r], starts[r + 1]) and, with them, `stops[r]` tokens; `table`
    [R, blocks] int32 is the block table."""
    sequences: list[SequencePlan] = []
    decodes = _Decodes()
    for r, budget in enumerate(budgets):
        first, count, stop = starts[r], starts[r + 1] - starts[r], stops[r]
        start = stop - count
        layout = budget.layout_in(wide) if budget else None
        if count == 1 and not (layout and layout.events(start, stop)):
            decodes.add(first, start, layout, table[r], block_size)
        elif count:
            seed = budget.seed if budget else 0
            pieces = plan_pieces(layout, start, stop)
            sequences.append(SequencePlan(first, start, stop, layout, seed, table[r], pieces))
    return ExpressMetadata(sequences, decodes.batch(), decodes.ring)


class _Decodes:
    """Collects the single-token requests of a batch."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.live: list[int] = []
        self.biases: list[np.ndarray | None] = []
        self.rows: list[np.ndarray] = []
        self.ring = RingWrite()

    def add(
        self, token: int, position: int, layout: Layout | None, row: np.ndarray, block_size: int
    ) -> None:
        self.tokens.append(token)
        self.rows.append(row)
        self.live.append(layout.live(position + 1) if layout else position + 1)
        self.biases.append(log_weights(layout, position + 1))
        if layout is None or (kept := ring_row(layout, position)) is None:
            return
        slot = layout.shape.slots - layout.shape.ring + kept // 2
        self.ring.tokens.append(token)
        self.ring.slots.append(int(row[slot // block_size]) * block_size + slot % block_size)
        self.ring.rows.append(kept)

    def batch(self) -> DecodeBatch | None:
        if not self.tokens:
            return None
        return DecodeBatch.make(self.tokens, self.live, np.stack(self.rows), self.biases)
