"""`Shape`: how the slots of a budget's cache are divided, and the limits that every cache keeps."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = [
    "EXACT_SHAPE", "MAX_TOKENS", "MIN_CAPACITY", "MIN_SLOTS", "NEVER", "PROFILES", "RING_ROWS",
    "RING_SLOTS", "SCHEDULES", "Shape", "least_interval", "make_shape",
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


def _interval(slots: int) -> int:
    """The default interval of a cache of so many slots beside its pinned tokens."""
    return _power_of_two_below(slots // 8, RING_ROWS, 512)


def _least_rest(slots: int) -> int:
    """Slots that pinned tokens must leave.  An eighth bounds how often a cache is thinned for the
    tokens that it holds, and so what a step's tables take."""
    return max(MIN_SLOTS, slots // 8)


def least_interval(shape: Shape) -> int:
    """The interval of a cache of as many slots, however many tokens it pins."""
    return min(shape.interval, _interval(_least_rest(shape.slots)))


def make_shape(
    slots: int,
    *,
    schedule: str = "lazy",
    profile: str = "recent",
    sinks: int = 4,
    pinned: int = 0,
    heavy: int | None = None,
    window: int | None = None,
    interval: int | None = None,
    group: int | None = None,
    exponent: float = 1.0,
) -> Shape:
    """Divide `slots` among sinks, heavy hitters, coreset, window, interval and ring.

    `pinned` tokens, if they are more than `sinks`, become the sinks, and the other sizes follow
    what the surplus leaves.  `None` picks the default: a quarter of that for the window, an eighth
    for heavy hitters and, as a power of two, for the interval.  Raises ValueError if no room is
    left for a coreset.
    """
    if slots < MIN_SLOTS:
        raise ValueError(f"a cache needs at least {MIN_SLOTS} slots, got {slots}")
    rest = slots - max(pinned - sinks, 0)
    if rest < _least_rest(slots):
        raise ValueError(
            f"{pinned} pinned tokens leave {rest} of {slots} slots; at least {_least_rest(slots)} "
            "are needed"
        )
    sinks = max(sinks, pinned)
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is not one of {', '.join(SCHEDULES)}")
    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r} is not one of {', '.join(PROFILES)}")
    if schedule == "paper":
        return replace(_paper_shape(slots, sinks, window, interval), exponent=exponent)
    heavy = rest // 8 if heavy is None else heavy
    window = rest // 4 if window is None else window
    interval = _interval(rest) if interval is None else interval
    group = _power_of_two_below(rest // 8, 16, 64) if group is None else group
    if window < RING_ROWS:
        raise ValueError(f"window must be at least {RING_ROWS} tokens, got {window}")
    if interval < RING_ROWS:
        raise ValueError(f"interval must be at least {RING_ROWS} tokens, got {interval}")
    if group < 2 or group % 2:
        raise ValueError(f"group must be an even number of entries, got {group}")
    ring = RING_SLOTS if heavy else 0
    capacity = slots - ring - sinks - heavy - window - interval
    least = max(rest // 8, MIN_CAPACITY)
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


#: Of every request that keeps all its tokens (`Shape.exact`).
EXACT_SHAPE = Shape("exact", NEVER, 0, 0, 0, 0, interval=NEVER, group=NEVER)
