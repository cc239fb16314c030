"""`StepPlan`: the device tables of a step's requests, built once on the host; every layer runs it.

A plan's requests may differ in everything but the `Kind` of their shapes: sizes are columns of the
tables.  The rows of the events that they run are in the same copy to the device, and die with the
plan.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from express_vllm.layout import RING_ROWS, Event

from ..batch import Chunk
from . import tables
from .constants import QUERY_ROWS
from .events import ROWS, EventRows, Kind, round_width, spread, weights
from .memory import Memory


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


class Extent(NamedTuple):
    """How much of everything some requests take in a plan: `scratch.py` makes bytes of it.

    Sums over requests, then maxima.
    """

    requests: int = 0
    instances: int = 0  # events
    dense: int = 0  # old live slots and new tokens
    scored: int = 0  # candidates for heavy hitters, of every event
    lists: int = 0  # entries of a KV head's lists
    tables: int = 0  # bytes of device tables
    old: int = 0  # live slots that a request held before the step
    tokens: int = 0  # new tokens
    final: int = 0  # live slots after it
    events: int = 0
    width: int = 1  # stored slots: entries of a list
    candidates: int = 0
    base: int = 1  # slots before an event, or of a list
    outputs: int = 1  # entries that an event's operations make
    longest: int = 0  # points of a halving
    round: int = 1  # halvings of a round

    def __add__(self, other: Extent) -> Extent:  # type: ignore[override]
        """Of both in one plan."""
        sums = (a + b for a, b in zip(self[:_SUMS], other[:_SUMS], strict=True))
        return Extent(*sums, *map(max, self[_SUMS:], other[_SUMS:]))


_SUMS = Extent._fields.index("old")


@dataclass
class Span:
    """A chunk in its layout: the events that it runs and what it takes.

    A `compacting` one has no new tokens: it runs the event at its position `start`.
    """

    chunk: Chunk
    events: list[Event]
    rows: list[EventRows]
    old: int
    known: int  # stored slots before the step
    stored: int  # and after it
    final: int
    stop: int
    upcoming: int  # position of the first event after the step
    extent: Extent

    @property
    def kind(self) -> Kind:
        return Kind.of(self.chunk.layout.shape)

    @property
    def shift(self) -> int:
        """From a position to its source index."""
        return self.old - self.chunk.start

    @classmethod
    def of(cls, chunk: Chunk, compacting: bool = False) -> Span:
        layout, start = chunk.layout, chunk.start
        shape = layout.shape
        stop = start if compacting else chunk.stop
        begin = layout.events_done(start)
        end = layout.events_done(stop + 1 if compacting else stop)
        events = [layout.event(k) for k in range(begin, end)]
        rows = [ROWS.get(shape, event) for event in events]
        stored = layout.event(end - 1).live_after - shape.window if end else 0
        known = events[0].incoming_start if events else stored
        old = layout.live(start)
        final = events[-1].live_after if compacting and events else layout.live(stop)
        return cls(
            chunk, events, rows, old, known, stored, final, stop,
            layout.position(end),
            _extent(chunk, events, rows, old, max(1, known, stored), final, stop),
        )  # fmt: skip


def room(event: Event, heavy: int) -> int:
    """Candidates for heavy hitters that an event's scores have room for."""
    return cdiv(heavy + event.incoming, 16) * 16 if heavy else 0


def _extent(
    chunk: Chunk, events: list[Event], rows: list[EventRows], old: int, width: int, final: int,
    stop: int,
) -> Extent:  # fmt: skip
    shape, tokens = chunk.layout.shape, stop - chunk.start
    width = max([width, *(e.incoming_start for e in events)])
    rooms = [room(e, shape.heavy) for e in events]
    ids = sum(r.ids + r.rounds.size + r.ops.size + tables.EVENT for r in rows)
    weighted = sum(e.incoming_start for e in events) + width
    tiles = tables.TILE * (tokens + len(events) + 1)  # at most one a token
    return Extent(
        1, len(events), old + tokens, sum(rooms), (len(events) + 1) * width,
        4 * (ids + weighted + tiles + 2 * tables.REQUEST + 32),  # and padding
        old, tokens, final, len(events), width, max(rooms, default=0),
        max([width, *(r.base for r in rows)]), max([1, *(r.outputs for r in rows)]),
        max((r.longest for r in rows), default=0), round_width(shape) if events else 1,
    )  # fmt: skip


@dataclass
class StepPlan:
    """Device tables of a step's requests, flat; see `tables.py` for the columns."""

    kind: Kind | None  # None: no request has an event
    extent: Extent
    tiles: int
    requests: Tensor
    events: Tensor
    items: Tensor
    rounds: Tensor
    ops: Tensor
    ids: Tensor
    bias: Tensor
    zero: Tensor  # int64 [1]: 0, the offset of the only layer
    memory: Memory  # scratch that plans and layers use in turn
    cached: dict[Any, Any] = field(default_factory=dict)

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once: layers run one after the other."""
        found = self.cached.get(key)
        if found is None:
            found = self.cached[key] = make()
        return found

    @classmethod
    def make(
        cls, chunks: Sequence[Chunk], group: int, device: torch.device, compacting: bool = False,
        tile: int = QUERY_ROWS,
    ) -> StepPlan:  # fmt: skip
        """Plan `chunks`, whose query heads are `group` times the KV heads."""
        return cls.of([Span.of(c, compacting) for c in chunks], device, 0 if compacting else
                      tile // group)  # fmt: skip

    @classmethod
    def of(
        cls, spans: Sequence[Span], device: torch.device, tile: int, memory: Memory | None = None
    ) -> StepPlan:
        """Plan `spans` with query tiles of `tile` tokens; 0: no new tokens.

        Raises ValueError if events of two kinds meet.
        """
        kinds = {span.kind for span in spans if span.events}
        if len(kinds) > 1:
            raise ValueError(f"a plan's events have one kind, these have {sorted(kinds)}")
        extent = functools.reduce(operator.add, (span.extent for span in spans))
        writer = _Writer(with_lists=bool(kinds))
        for span in spans:
            writer.add(span, tile)
        arrays = writer.arrays()
        requests, events, items, rounds, ops, ids, bias, zero = to_device(
            [*arrays, np.zeros(1, np.int64)], device
        )
        return cls(
            kinds.pop() if kinds else None, extent, len(arrays[2]), requests, events, items, rounds,
            ops, ids, bias, zero, memory or Memory(device),
        )  # fmt: skip


class _Writer:
    """Collects the tables of a plan."""

    def __init__(self, with_lists: bool) -> None:
        self.with_lists = with_lists  # else all lists are one: every slot is where it was
        self.requests: list[tuple] = []
        self.events: list[tuple] = []
        self.items: list[np.ndarray] = [np.zeros((0, tables.TILE), np.int32)]
        self.rows: dict[int, int] = {}  # identity of an event's rows -> which of `unique`
        self.unique: list[EventRows] = []
        self.placed: list[int] = []  # which of `unique`, by event
        self.weights: dict[tuple, int] = {}  # a state's stored slots -> offset into the bias
        self.runs: list[tuple[float, int]] = []
        self.lists = self.dense = self.scored = self.biased = 0

    def add(self, span: Span, tile: int) -> None:
        chunk, shape, extent = span.chunk, span.chunk.layout.shape, span.extent
        owner, first_event = len(self.requests), len(self.events)
        width = extent.width if self.with_lists else 0
        self.requests.append(
            (
                first_event, len(span.events), span.old, span.shift, chunk.token, self.dense,
                chunk.seed & 0xFFFFFFFF, (chunk.seed >> 32) & 0xFFFFFFFF, chunk.row, self.lists,
                width, span.known, span.stored, span.final, span.stop,
                chunk.layout.ring_start if shape.ring else -1, span.upcoming - RING_ROWS,
            )
        )  # fmt: skip
        for event, rows in zip(span.events, span.rows, strict=True):
            self._event(span, owner, event, rows)
        if tile:
            self.items += self._items(span, owner, width, tile)
        self.dense += extent.dense
        self.lists += extent.lists if self.with_lists else 0

    def _event(self, span: Span, owner: int, event: Event, rows: EventRows) -> None:
        chunk, shape = span.chunk, span.chunk.layout.shape
        place = self.rows.setdefault(id(rows), len(self.unique))
        if place == len(self.unique):
            self.unique.append(rows)
        self.placed.append(place)
        first = event.position - RING_ROWS
        size = room(event, shape.heavy)
        self.events.append(
            (
                event.position, event.incoming_start, event.incoming, event.live_before,
                rows.after, 0, len(rows.rounds), 0, self._bias(span, event.before,
                event.drawn_before), shape.sinks, shape.heavy, owner,
                min(max(chunk.start - first, 0), RING_ROWS), chunk.token + first - chunk.start,
                self.scored, size,
            )
        )  # fmt: skip
        self.scored += size

    def _bias(self, span: Span, levels: tuple[int, ...], drawn: int) -> int:
        """Offset of the log2 weights of a state's stored slots."""
        shape = span.chunk.layout.shape
        key = (shape.coreset_start, shape.exponent, levels, drawn)
        found = self.weights.get(key)
        if found is None:
            found = self.weights[key] = self.biased
            runs = weights(shape, levels, drawn)
            self.runs += runs
            self.biased += sum(count for _, count in runs)
        return found

    def _items(self, span: Span, owner: int, width: int, tile: int) -> list[np.ndarray]:
        """Query tiles of a chunk: none crosses an event."""
        chunk, window = span.chunk, span.chunk.layout.shape.window
        bounds = [chunk.start, *(e.position for e in span.events), span.stop]
        past = chunk.layout.events_done(chunk.start)
        before = chunk.layout.event(past - 1) if past else None
        states = [before, *span.events]
        found = []
        for k, state in enumerate(states):
            low, high = bounds[k], bounds[k + 1]
            first = np.arange(low, high, tile)
            part = np.empty((len(first), tables.TILE), np.int32)
            part[:, tables.TILE_ROW] = chunk.token + first - chunk.start
            part[:, tables.TILE_TOKENS] = np.minimum(tile, high - first)
            part[:, tables.TILE_LIST] = self.lists + k * width
            stored, bias, recent = 0, 0, 0
            if state is not None:
                stored = state.live_after - window
                bias = self._bias(span, state.levels, state.drawn)
                recent = state.position - window
            part[:, tables.TILE_STORED] = stored
            part[:, tables.TILE_BIAS] = bias
            part[:, tables.TILE_RECENT] = recent + span.shift
            part[:, tables.TILE_LAST] = first + span.shift
            part[:, tables.TILE_REQUEST] = owner
            part[:, tables.TILE_NEEDED] = 0 if state is None else k + 1
            found.append(part)
        return found

    def arrays(self) -> list[np.ndarray]:
        """Requests, events, items, rounds, ops, ids and bias."""
        events = np.array(self.events, np.int32).reshape(-1, tables.EVENT)
        rows = self.unique
        counts = np.array([(r.ids, len(r.ops), len(r.rounds)) for r in rows], np.int32)
        counts = counts.reshape(-1, 3)
        begin = counts.cumsum(0, dtype=np.int32) - counts
        ops = _joined([r.ops for r in rows], tables.OP)
        ops[:, tables.INPUTS] += np.repeat(begin[:, 0], counts[:, 1])
        rounds = _joined([r.rounds for r in rows], 2)
        rounds[:, 0] += np.repeat(begin[:, 1], counts[:, 2])
        if rows:
            final = begin[:, 0] + np.array([r.final for r in rows], np.int32)
            events[:, tables.ROUND] = begin[self.placed, 2]
            events[:, tables.FINAL] = final[self.placed]
        weight, count = zip(*self.runs, strict=True) if self.runs else ((), ())
        return [
            np.array(self.requests, np.int64).reshape(-1, tables.REQUEST), events,
            np.concatenate(self.items), rounds, ops,
            spread(_joined([r.runs for r in rows], 2)),
            np.repeat(np.array(weight, np.float32), np.array(count, np.int32)),
        ]  # fmt: skip


def _joined(arrays: list[np.ndarray], columns: int) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros((0, columns), np.int32)


def to_device(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copy arrays in one transfer that the host does not wait for; -> flat views of the copy."""
    sizes = [cdiv(max(a.nbytes, 1), 16) * 4 for a in arrays]  # words, so that each is aligned
    host = staging(4 * sum(sizes), device)
    at = 0
    words = host.numpy()
    for array, size in zip(arrays, sizes, strict=True):
        words[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
        at += 4 * size
    copy = host.to(device, non_blocking=True).view(torch.int32)
    return [
        part[: array.nbytes // 4].view(_TYPES[array.dtype.type])
        for part, array in zip(copy.split(sizes), arrays, strict=True)
    ]


_TYPES = {np.int32: torch.int32, np.int64: torch.int64, np.float32: torch.float32}


def upload(array: np.ndarray, out: Tensor) -> None:
    """Copy `array` to the device tensor `out`, of its size; the host does not wait."""
    host = staging(array.nbytes, out.device)
    host.numpy()[:] = array.reshape(-1).view(np.uint8)
    out.copy_(host.view(out.dtype), non_blocking=True)


def staging(size: int, device: torch.device) -> Tensor:
    """Bytes on the host, from which a copy to `device` needs no waiting."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
