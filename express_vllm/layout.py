"""`Layout`: the pure function from (token count, budget) to what a cache looks like.

Which tokens survive differs per layer and KV head; *how many*, in which slots and with what
weight does not.  A `Layout` answers those questions without tensors, so that the scheduler
knows every slot count in advance and weights need no storage.

Slots of one request, per layer and KV head (`Shape` holds the sizes)::

    [ sinks | heavy hitters | coreset: heavy ... light levels | recent tokens )  free  [ ring ]
    0                                                                     live(n)  slots-ring  slots

A level w holds entries of weight 2^w.  A halving takes the *oldest* entries of a level, keeps one
of each pair and appends them to the next heavier level, so that every level stays one contiguous,
chronological slot range and a halving rewrites one range at its own start.

Compaction events happen at fixed absolute positions E_k = first_event + k * interval.  Event k runs
before the token at position E_k is processed, after exactly E_k tokens were stored; so a state is
a function of the token count alone, however the tokens arrived.

Source: Express Language Modeling (arXiv 2606.10944) for the `paper` schedule; docs/algorithm.md for
the `lazy` one.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .schedules import Count, Lazy, Op, Paper, State
from .shape import NEVER, RING_ROWS, Shape

__all__ = ["Attended", "Event", "Layout", "Segment", "layout_for"]


class Segment(NamedTuple):
    """`length` consecutive slots whose entries stand for `weight` tokens each, and what that adds
    to their attention scores: log2 of weight^exponent."""

    length: int
    weight: int
    log2_weight: float


class Event(NamedTuple):
    """One compaction: first choose heavy hitters, then run `ops` in order.

    Before it the cache holds `live_before` slots, of which [incoming_start, incoming_start +
    incoming) leave the recent tokens.  After it `levels[w]` entries have weight 2^w, `drawn` tokens
    stand behind a single partial entry (0: none), and `live_after` slots are live.  `before` and
    `drawn_before` are levels and tokens of the partial entry before it.
    """

    number: int
    position: int
    incoming_start: int
    incoming: int
    live_before: int
    live_after: int
    ops: tuple[Op, ...]
    levels: tuple[int, ...]
    drawn: int
    before: tuple[int, ...]
    drawn_before: int


class Attended(NamedTuple):
    """Live slots over a range of token counts."""

    total: int
    most: int


class Layout:
    """Slot counts, weights and compaction events of one budget, for any token count.

    Counts are closed forms: they walk nothing and keep nothing.  Only `event`, `events` and
    `segments` need the sizes of the coreset's levels.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._schedule = Paper(shape) if shape.schedule == "paper" else Lazy(shape)

    def events_done(self, tokens: Count) -> Count:
        """How many events have run when `tokens` tokens are stored (E_k < tokens)."""
        done = (tokens - 1 - self.shape.first_event) // self.shape.interval + 1
        return done * (done > 0)

    def position(self, index: Count) -> Count:
        """Where event `index` runs: before the token at this position."""
        return self.shape.first_event + index * self.shape.interval

    def next_event_position(self, tokens: Count) -> Count:
        """Position of the first event that has not run when `tokens` tokens are stored."""
        return self.position(self.events_done(tokens))

    def last_event_position(self, tokens: int) -> int:
        """Position of the last event that has run when `tokens` tokens are stored; -1: none has."""
        done = self.events_done(tokens)
        return self.position(done - 1) if done else -1

    @property
    def ring_start(self) -> int:
        """First slot of the query ring; without one, the end of the slots."""
        return self.shape.slots - self.shape.ring

    def ring_from(self, tokens: Count) -> Count:
        """Position whose query is row 0 of the ring when `tokens` tokens are stored: the next event
        scores with the RING_ROWS queries from there on.  Without a ring, NEVER."""
        if not self.shape.ring:
            return 0 * tokens + NEVER
        return self.next_event_position(tokens) - RING_ROWS

    def ring_row(self, position: Count) -> Count:
        """The ring row that keeps the query at `position`, an integer or an array of any shape;
        below 0: none does.  Two rows lie in a slot, in its key half and in its value half."""
        return position - self.ring_from(position + 1)

    def live_after(self, index: Count) -> Count:
        """Live slots after event `index`."""
        shape = self.shape
        return shape.coreset_start + self._schedule.stored(index + 1) + shape.window

    def live(self, tokens: int) -> int:
        """Slots that hold keys and values when `tokens` tokens are stored."""
        done = self.events_done(tokens)
        if done == 0:
            return tokens
        return self.live_after(done - 1) + tokens - self.position(done - 1)

    def thinned(self, start: int, stop: int) -> int:
        """Entries that the events of the tokens at positions [start, stop) take out."""
        first, end = self.events_done(start), self.events_done(stop)
        if first == end:
            return 0
        before = self.live(self.position(first))
        return before + (end - 1 - first) * self.shape.interval - self.live_after(end - 1)

    def attended(self, start: int, stop: int) -> Attended:
        """Over states of `start` to `stop` - 1 tokens, of which there is at least one."""
        # Between events k - 1 and k a state of n tokens has n + shift[k] live slots.
        events = np.arange(self.events_done(start), self.events_done(stop - 1) + 1)
        bounds = self.position(np.append(events[:1] - 1, events)) + 1
        bounds[0], bounds[-1] = start, stop
        shift = np.zeros_like(events)
        done = events[events > 0]
        if len(done):
            shift[events > 0] = self.live_after(done - 1) - self.position(done - 1)
        low, high = bounds[:-1] + shift, bounds[1:] - 1 + shift
        return Attended(int(((low + high) * (high - low + 1) // 2).sum()), int(high.max()))

    def event(self, index: int) -> Event:
        found = _events.get((self, index))
        if found is None:
            found = _events[self, index] = self._event(index)
            if len(_events) > MOST_EVENTS:
                del _events[next(iter(_events))]
        return found

    def events(self, start: int, stop: int) -> list[Event]:
        """The events that run while tokens at positions [start, stop) are processed."""
        return [self.event(k) for k in range(self.events_done(start), self.events_done(stop))]

    def _event(self, index: int) -> Event:
        last = _events.get((self, index - 1))
        before = State(last.levels, last.drawn) if last else self._schedule.state(index)
        incoming = self.shape.incoming(index)
        ops, after = self._schedule.compact(before, incoming)
        self._schedule.keep(index + 1, after)
        start, window = self.shape.coreset_start, self.shape.window
        stored = start + before.stored
        return Event(
            index, self.position(index), stored, incoming, stored + incoming + window,
            start + after.stored + window, ops, *after, *before,
        )  # fmt: skip

    def segments(self, tokens: int) -> list[Segment]:
        """The live slots in order; lengths sum to `live(tokens)`, length * weight to `tokens`."""
        done = self.events_done(tokens)
        if done == 0:
            return [self._segment(tokens, 1)] if tokens else []
        event = self.event(done - 1)
        parts = [(self.shape.sinks + self.shape.heavy, 1)]
        parts += [(size, 1 << w) for w, size in reversed(list(enumerate(event.levels)))]
        parts.append((1 if event.drawn else 0, event.drawn))
        parts.append((self.shape.window + tokens - event.position, 1))
        return [self._segment(*part) for part in parts if part[0]]

    def _segment(self, length: int, weight: int) -> Segment:
        return Segment(length, weight, self.shape.exponent * math.log2(weight))

    def reserved(self, tokens: int) -> int:
        """Slots that must be allocated once `tokens` tokens are stored: never shrinks in a request.

        Inside the exact phase a slot is a position; near its end the query ring comes into use.
        """
        if self.shape.ring and tokens > self.plain_until:
            return self.shape.slots
        return min(tokens, self.shape.slots)

    @property
    def plain_until(self) -> int:
        """Tokens until which the cache looks as that of exact attention: without queries."""
        return self.shape.first_event - (RING_ROWS if self.shape.ring else 0)

    @property
    def attended_peak(self) -> int:
        """The most entries that a token attends to, itself included."""
        return self.ring_start


#: Events of all layouts that were asked for last, some 2 KB each, and the most that are kept.
_events: dict[tuple[Layout, int], Event] = {}
MOST_EVENTS = 8192
#: Layouts that are kept, of some KB each.
MOST_LAYOUTS = 4096


@lru_cache(MOST_LAYOUTS)
def layout_for(shape: Shape) -> Layout:
    """The shared `Layout` of a shape.  Budgets lie on a grid (budget.on_grid), so that a server has
    a few hundred, and none is dropped unless its users pin as many lengths; a layout that was
    dropped is built again."""
    return Layout(shape)
