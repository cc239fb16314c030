"""`Plan`: what a step must do, built once on the host and shared by every layer.

Budgets and token counts come from the scheduler; `layout` turns them into slots, so nothing is
read back from a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata

from express_vllm.budget import Budget
from express_vllm.layout import RING_ROWS, Event, Layout, Segment

from .cpu.decode import DecodeBatch
from .step import current_step


@dataclass
class Piece:
    """Tokens [start, stop) of a request between two events, after `live` slots of state.

    `bias` holds log w of those slots (None: all weights are 1); `event` runs after the piece.
    """

    start: int
    stop: int
    live: int
    bias: np.ndarray | None
    event: Event | None


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
    """Decode tokens whose query row must be kept: batch rows, pool slots, halves of the slots."""

    tokens: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    halves: list[int] = field(default_factory=list)


@dataclass
class ExpressMetadata:
    """The step's plan."""

    sequences: list[SequencePlan]
    decode: DecodeBatch | None
    ring: RingWrite


@lru_cache(maxsize=4096)
def _bias(segments: tuple[Segment, ...]) -> np.ndarray:
    lengths = [s.length for s in segments]
    logs = np.log(np.array([s.weight for s in segments], np.float64)).astype(np.float32)
    return np.repeat(logs, lengths)


def bias_before(layout: Layout | None, position: int) -> np.ndarray | None:
    """log w of the slots that the token at `position` finds, itself excluded; None: all 1."""
    if layout is None or layout.events_done(position + 1) == 0:
        return None
    event = layout.event(layout.events_done(position + 1) - 1)
    fixed = _bias(tuple(layout.segments(event.position + 1)))
    return fixed[:-1] if position == event.position else _pad(fixed, position - event.position - 1)


def _pad(bias: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([bias, np.zeros(count, np.float32)])


def ring_row(layout: Layout, position: int) -> int | None:
    """The ring row that keeps the query at `position`, if the next event scores with it."""
    if not layout.shape.ring:
        return None
    upcoming = layout.shape.first_event + layout.events_done(position + 1) * layout.shape.interval
    row = position - (upcoming - RING_ROWS)
    return row if row >= 0 else None


def plan_pieces(layout: Layout | None, start: int, stop: int) -> list[Piece]:
    """Cut [start, stop) at the events that run while those tokens are processed."""
    pieces, position = [], start
    for event in layout.events(start, stop) if layout else []:
        pieces.append(_piece(layout, position, event.position, event))
        position = event.position
    pieces.append(_piece(layout, position, stop, None))
    return pieces


def _piece(layout: Layout | None, start: int, stop: int, event: Event | None) -> Piece:
    if start == stop:  # the event runs before the first token of the step
        assert layout is not None and event is not None
        bias = None
        if event.number:
            bias = _bias(tuple(layout.segments(start)))
        return Piece(start, stop, event.live_before, bias, event)
    bias = bias_before(layout, start)
    if layout is None:
        live = start
    else:
        done = layout.events_done(start + 1)
        live = (
            start
            if done == 0
            else (layout.event(done - 1).live_after + start - layout.event(done - 1).position)
        )
    return Piece(start, stop, live, bias, event)


class ExpressMetadataBuilder(AttentionMetadataBuilder[ExpressMetadata]):
    """Splits a batch into single-token requests without an event and the rest."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block_size = kv_cache_spec.block_size

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> ExpressMetadata:
        common = common_attn_metadata
        return plan_batch(
            current_step().batch(common.num_reqs),
            common.query_start_loc_cpu.tolist(),
            common.seq_lens.tolist(),
            common.block_table_tensor.numpy(),
            self.block_size,
        )


def plan_batch(
    budgets: Sequence[Budget | None],
    starts: Sequence[int],
    stops: Sequence[int],
    table: np.ndarray,
    block_size: int,
) -> ExpressMetadata:
    """The plan of a batch: request r owns batch rows [starts[r], starts[r + 1]) and, with them,
    `stops[r]` tokens; `table` [R, blocks] int32 is the block table."""
    sequences: list[SequencePlan] = []
    decodes = _Decodes()
    for r, budget in enumerate(budgets):
        first, count, stop = starts[r], starts[r + 1] - starts[r], stops[r]
        start = stop - count
        layout = budget.layout if budget else None
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
        bias = bias_before(layout, position)
        self.biases.append(None if bias is None else _pad(bias, 1))
        if layout is None or (kept := ring_row(layout, position)) is None:
            return
        slot = layout.shape.slots - layout.shape.ring + kept // 2
        self.ring.tokens.append(token)
        self.ring.slots.append(int(row[slot // block_size]) * block_size + slot % block_size)
        self.ring.halves.append(kept % 2)

    def batch(self) -> DecodeBatch | None:
        if not self.tokens:
            return None
        return DecodeBatch.make(self.tokens, self.live, np.stack(self.rows), self.biases)
