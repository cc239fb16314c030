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
from functools import lru_cache
from typing import NamedTuple

#: Query rows kept for scoring heavy hitters: the last positions before an event.
RING_ROWS = 32
#: Slots that the rows need: a slot's key half and value half hold one row each.
RING_SLOTS = RING_ROWS // 2
#: Smallest legal budget: below it no schedule has room for a coreset.
MIN_SLOTS = 128

SCHEDULES = ("lazy", "paper")
#: Profile name -> rho, the ratio of the target sizes of a level and the next heavier one.
PROFILES = {"recent": 1.0, "even": 0.25}

HALVE, DRAW = 0, 1


class Segment(NamedTuple):
    """`length` consecutive slots whose entries stand for `weight` tokens each, and what that adds
    to their attention scores: log2 of weight^exponent."""

    length: int
    weight: int
    log2_weight: float


class Op(NamedTuple):
    """One rewrite of a slot range inside an event, in the slots valid when it runs.

    `HALVE`: [start, start + length) -> length / 2 kept entries at start; what follows moves down.
    `DRAW`: the same range -> one entry; entry 0 counts `seen` times if `seen` > 0, the rest once.
    """

    kind: int
    start: int
    length: int
    level: int
    seen: int = 0


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
    if capacity < slots // 8:
        raise ValueError(
            f"{slots} slots leave {capacity} for the coreset beside {sinks} sinks, {heavy} heavy "
            f"hitters, a window of {window}, an interval of {interval} and {ring} for queries; "
            f"at least {slots // 8} are needed"
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


class Layout:
    """Slot counts, weights and compaction events of one budget, for any token count."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._events: list[Event] = []
        self._policy = _PaperPolicy(shape) if shape.schedule == "paper" else _LazyPolicy(shape)

    def events_done(self, tokens: int) -> int:
        """How many events have run when `tokens` tokens are stored (E_k < tokens)."""
        late = tokens - 1 - self.shape.first_event
        return 0 if late < 0 else late // self.shape.interval + 1

    def event(self, index: int) -> Event:
        while len(self._events) <= index:
            self._events.append(self._next_event())
        return self._events[index]

    def events(self, start: int, stop: int) -> list[Event]:
        """The events that run while tokens at positions [start, stop) are processed."""
        return [self.event(k) for k in range(self.events_done(start), self.events_done(stop))]

    def next_event_position(self, tokens: int) -> int:
        """Position of the first event that has not run when `tokens` tokens are stored."""
        return self.shape.first_event + self.events_done(tokens) * self.shape.interval

    def live(self, tokens: int) -> int:
        """Slots that hold keys and values when `tokens` tokens are stored."""
        done = self.events_done(tokens)
        if done == 0:
            return tokens
        event = self.event(done - 1)
        return event.live_after + tokens - event.position

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
        return self.shape.slots - self.shape.ring

    def _next_event(self) -> Event:
        shape = self.shape
        index = len(self._events)
        previous = self._events[-1] if self._events else None
        position = shape.first_event + index * shape.interval
        live = previous.live_after + shape.interval if previous else shape.first_event
        stored = shape.coreset_start
        if previous:
            stored += sum(previous.levels) + (1 if previous.drawn else 0)
        incoming = live - shape.window - stored
        before = previous.levels if previous else ()
        drawn_before = previous.drawn if previous else 0
        ops, levels, drawn = self._policy.compact(list(before), drawn_before, incoming)
        after = shape.coreset_start + sum(levels) + (1 if drawn else 0) + shape.window
        return Event(
            index, position, stored, incoming, live, after, tuple(ops), tuple(levels), drawn,
            before, drawn_before,
        )  # fmt: skip


class _Area:
    """The coreset's level sizes while an event's operations are being planned."""

    def __init__(self, levels: list[int], start: int) -> None:
        self.levels = levels
        self.start = start
        self.ops: list[Op] = []

    def level_start(self, level: int) -> int:
        return self.start + sum(self.levels[level + 1 :])

    def add(self, level: int, count: int) -> None:
        while len(self.levels) <= level:
            self.levels.append(0)
        self.levels[level] += count

    def halve(self, level: int, length: int) -> None:
        """Halve the oldest `length` entries of `level`."""
        self.ops.append(Op(HALVE, self.level_start(level), length, level))
        self.levels[level] -= length
        self.add(level + 1, length // 2)


class _LazyPolicy:
    """Keep the area full: on overflow halve the oldest entries of the most oversized level.

    Target sizes are proportional to rho^(top - level): with rho = 1 every weight level gets the
    same number of slots (recent tokens stay dense), with rho < 1 heavier, older levels get more.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def compact(
        self, levels: list[int], drawn: int, incoming: int
    ) -> tuple[list[Op], list[int], int]:
        shape = self.shape
        area = _Area(levels, shape.coreset_start)
        area.add(0, incoming)
        total = sum(area.levels)
        while total > shape.capacity:
            level = self._most_oversized(area.levels)
            length = min(shape.group, 2 * (total - shape.capacity), area.levels[level] & ~1)
            area.halve(level, length)
            total -= length // 2
        return area.ops, area.levels, 0

    def _most_oversized(self, levels: list[int]) -> int:
        top = len(levels) - 1
        unit = self.shape.capacity / sum(self.shape.rho ** (top - w) for w in range(top + 1))
        excess = [
            size - unit * self.shape.rho ** (top - w) if size >= 2 else float("-inf")
            for w, size in enumerate(levels)
        ]
        return excess.index(max(excess))


class _PaperPolicy:
    """Published Express: exact, halve and thin phases with streaming Compress2.

    With the coreset at weight 2^m, thinning level w (base <= w < m, base = max(0, m - m-bar))
    collects groups of n_out * 2^(w + 2 - m) entries and halves each full group into level w + 1;
    the top level's half joins the coreset.  At 4 * n_out the coreset is halved twice and m grows
    by two.  Above m-bar one of every 2^base incoming tokens is drawn uniformly (a reservoir of one
    entry).
    """

    def __init__(self, shape: Shape) -> None:
        self.target = shape.target
        self.inflation = shape.inflation
        self.start = shape.coreset_start

    def compact(
        self, levels: list[int], drawn: int, incoming: int
    ) -> tuple[list[Op], list[int], int]:
        area = _Area(levels, self.start)
        exponent = len(levels) - 1
        if exponent < 0:  # the exact phase ends: 4 * n_out points of weight 1
            area.add(0, incoming)
            self._halve_coreset(area, 0)
            return area.ops, area.levels, 0
        while incoming:
            exponent = len(area.levels) - 1
            base = max(0, exponent - self.inflation)
            if base:
                taken, drawn = self._draw(area, base, drawn, incoming)
            else:
                taken = min(incoming, self._group(0, exponent) - area.levels[0])
                area.add(0, taken)
            incoming -= taken
            self._cascade(area, base, exponent)
        return area.ops, area.levels, drawn

    def _group(self, level: int, exponent: int) -> int:
        return self.target * 2 ** (level + 2) // 2**exponent

    def _draw(self, area: _Area, base: int, drawn: int, incoming: int) -> tuple[int, int]:
        taken = min(incoming, (1 << base) - drawn)
        length = taken + (1 if drawn else 0)
        start = area.level_start(base) + area.levels[base]
        area.ops.append(Op(DRAW, start, length, base, drawn))
        drawn += taken
        if drawn == 1 << base:
            area.add(base, 1)
            drawn = 0
        return taken, drawn

    def _cascade(self, area: _Area, base: int, exponent: int) -> None:
        for level in range(base, exponent):
            if area.levels[level] < self._group(level, exponent):
                return
            area.halve(level, area.levels[level])
        if area.levels[exponent] == 4 * self.target:
            self._halve_coreset(area, exponent)

    def _halve_coreset(self, area: _Area, exponent: int) -> None:
        area.halve(exponent, 4 * self.target)
        area.halve(exponent + 1, 2 * self.target)


#: Of a request without a budget: its cache never reaches the first event.
EXACT_SHAPE = Shape("exact", 1 << 40, 0, 0, 0, 0, interval=1 << 40, group=1 << 40)


@lru_cache(maxsize=512)
def layout_for(shape: Shape) -> Layout:
    """The shared `Layout` of a shape: its events are planned once per process."""
    return Layout(shape)
