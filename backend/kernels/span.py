"""Chunks in their layouts: the events that a request runs in a step, and how much of everything it
takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from express_vllm.layout import Event

from ..batch import Chunk
from . import tables
from .events import ROWS, EventRows, Kind, round_width


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
    acts = sum(4 * r.ids + r.rounds.nbytes + r.ops.nbytes + tables.EVENT.itemsize for r in rows)
    weighted = sum(e.incoming_start for e in events) + width
    tiles = tables.TILE.itemsize * (tokens + len(events) + 1)  # at most one a token
    return Extent(
        1, len(events), old + tokens, sum(rooms), (len(events) + 1) * width,
        acts + 4 * weighted + tiles + tables.REQUEST.itemsize + 128,  # and padding
        old, tokens, final, len(events), width, max(rooms, default=0),
        max([width, *(r.base for r in rows)]), max([1, *(r.outputs for r in rows)]),
        max((r.longest for r in rows), default=0), round_width(shape) if events else 1,
    )  # fmt: skip
