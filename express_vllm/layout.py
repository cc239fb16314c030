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
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np

from .schedules import DRAW, HALVE, Count, Lazy, Op, Paper, State

__all__ = [
    "DRAW", "EXACT_SHAPE", "HALVE", "MAX_TOKENS", "MIN_SLOTS", "NEVER", "PROFILES", "RING_ROWS",
    "RING_SLOTS", "SCHEDULES", "Attended", "Event", "Layout", "Op", "Segment", "Shape", "State",
    "layout_for", "make_shape",
]  # fmt: skip

#: Query rows kept for scoring heavy hitters: the last positions before an event.
RING_ROWS = 32
#: Slots that the rows need: a slot's key half and value half hold one row each.
RING_SLOTS = RING_ROWS // 2
#: Smallest legal budget: below it no schedule has room for a coreset.
MIN_SLOTS = 128

SCHEDULES = ("lazy", "paper")
#: Profile name -> rho, the ratio of the target sizes of a level and the next heavier one.
PROFILES = {"recent": 1.0, "even": 0.25}

#: Smallest area of a lazy coreset.  A halving needs two entries in some level; with one entry in
#: each, an overfull area of C slots has more than C levels, which takes 2^(C + 1) - 1 tokens: with
#: 24, more than MAX_TOKENS.
MIN_CAPACITY = 24
#: The longest sequence that layouts are made for: positions fit 32 bits, levels `MIN_CAPACITY`.
MAX_TOKENS = 1 << 24
#: A position that no sequence has.
NEVER = 1 << 40


class Segment(NamedTuple):
    """`length` consecutive slots whose entries stand for `weight` tokens each, and what that adds
    to their attention scores: log2 of weight^exponent."""

    length: int
    weight: int
    log2_weight: float


@dataclass(frozen=True)
class Shape:
    """Static sizes of a budget's cache, in slots per layer and KV head.

    `slots` is the most that the request ever holds; `ring` of them, the last ones, keep queries.
    `capacity` is the coreset's area (lazy); `target`, `inflation` are the paper's n_out and m-bar.
    An entry that stands for w tokens attends with weight w^exponent: 1, as published, has no bias,
    less has less noise (docs/algorithm.md).
    """

    schedule: str
    slots: int
    ring: int
    sinks: int
    heavy: int
    window: int
    interval: int
    capacity: int = 0
    group: int = 0
    rho: float = 1.0
    target: int = 0
    inflation: int = 0
    exponent: float = 1.0

    @property
    def exact(self) -> bool:
        """Whether every token is kept: a position is a slot, and no event ever comes."""
        return self.schedule == "exact"

    @property
    def first_event(self) -> int:
        """Tokens that the exact phase holds: the position of the first compaction."""
        if self.schedule == "paper":
            return self.sinks + 4 * self.target + self.window
        return self.slots - self.ring

    @property
    def kernel(self) -> str:
        """The halving kernel of the schedule (reference.halving.kernel_matrix)."""
        return "exponential" if self.schedule == "paper" else "gaussian"

    @property
    def coreset_start(self) -> int:
        return self.sinks + self.heavy

    def incoming(self, event: int) -> int:
        """Tokens that leave the recent ones at an event."""
        return self.interval if event else self.first_event - self.window - self.coreset_start


def _power_of_two_below(value: int, low: int, high: int) -> int:
    return max(low, min(high, 1 << (max(value, 1).bit_length() - 1)))


def make_shape(
    slots: int,
    *,
    schedule: str = "lazy",
    profile: str = "recent",
    sinks: int = 4,
    heavy: int | None = None,
    window: int | None = None,
    interval: int | None = None,
    group: int | None = None,
    exponent: float = 1.0,
) -> Shape:
    """Divide `slots` among sinks, heavy hitters, coreset, window, interval and ring.

    `None` picks the default: a quarter for the window, an eighth for heavy hitters and, as a power
    of two, for the interval.  Raises ValueError if no room is left for a coreset.
    """
    if slots < MIN_SLOTS:
        raise ValueError(f"a cache needs at least {MIN_SLOTS} slots, got {slots}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is not one of {', '.join(SCHEDULES)}")
    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r} is not one of {', '.join(PROFILES)}")
    if schedule == "paper":
        return replace(_paper_shape(slots, sinks, window, interval), exponent=exponent)
    heavy = slots // 8 if heavy is None else heavy
    window = slots // 4 if window is None else window
    interval = _power_of_two_below(slots // 8, RING_ROWS, 512) if interval is None else interval
    group = _power_of_two_below(slots // 8, 16, 64) if group is None else group
    if window < RING_ROWS:
        raise ValueError(f"window must be at least {RING_ROWS} tokens, got {window}")
    if interval < RING_ROWS:
        raise ValueError(f"interval must be at least {RING_ROWS} tokens, got {interval}")
    if group < 2 or group % 2:
        raise ValueError(f"group must be an even number of entries, got {group}")
    ring = RING_SLOTS if heavy else 0
    capacity = slots - ring - sinks - heavy - window - interval
    least = max(slots // 8, MIN_CAPACITY)
    if capacity < least:
        raise ValueError(
            f"{slots} slots leave {capacity} for the coreset beside {sinks} sinks, {heavy} heavy "
            f"hitters, a window of {window}, an interval of {interval} and {ring} for queries; "
            f"at least {least} are needed"
        )
    return Shape(
        schedule, slots, ring, sinks, heavy, window, interval, capacity, group, PROFILES[profile],
        exponent=exponent,
    )  # fmt: skip


def _paper_shape(slots: int, sinks: int, window: int | None, interval: int | None) -> Shape:
    """n_out = floor((slots - sinks - window - interval - 1) / 6), a multiple of 2^inflation.

    2^inflation = Theta(n_out), with a constant that leaves at least 16 entries to the smallest
    group, so that every group is even.  The slots that the rounding frees go to the window.
    """
    window = 32 if window is None else window
    interval = 32 if interval is None else interval
    room = slots - sinks - window - interval - 1  # one slot for the entry being drawn
    target = room // 6
    if target < 8:
        raise ValueError(
            f"{slots} slots leave {room} for the coreset beside {sinks} sinks, a window of "
            f"{window} and an interval of {interval}; the paper schedule needs at least 48"
        )
    inflation = max(1, target.bit_length() - 3)
    target -= target % (1 << inflation)
    window += room - 6 * target
    return Shape("paper", slots, 0, sinks, 0, window, interval, target=target, inflation=inflation)


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
        shape = self.shape
        if shape.ring and tokens > shape.first_event - RING_ROWS:
            return shape.slots
        return min(tokens, shape.slots)

    @property
    def attended_peak(self) -> int:
        """The most entries that a token attends to, itself included."""
        return self.ring_start


#: Of every request that keeps all its tokens (`Shape.exact`).
EXACT_SHAPE = Shape("exact", NEVER, 0, 0, 0, 0, interval=NEVER, group=NEVER)

#: Events of all layouts that were asked for last, some 2 KB each, and the most that are kept.
_events: dict[tuple[Layout, int], Event] = {}
MOST_EVENTS = 8192


@cache
def layout_for(shape: Shape) -> Layout:
    """The shared `Layout` of a shape.  None is dropped: budgets lie on a grid (budget.on_grid), so
    that a server has a few hundred, of some KB each."""
    return Layout(shape)
