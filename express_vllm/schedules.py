"""How a cache is thinned: which halvings an event runs, from the sizes of the coreset's levels.

A schedule's state is (`levels`, `drawn`): `levels[w]` entries have weight 2^w, and `drawn` tokens
stand behind a single partial entry (0: none).  `compact` takes a state to the next one; it is a
pure function, so a state depends on the number of tokens alone.

Source: Express Language Modeling (arXiv 2606.10944) for the `paper` schedule; docs/algorithm.md for
the `lazy` one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    from .shape import Shape

HALVE, DRAW = 0, 1

#: A token count, or an array of them.
Count = TypeVar("Count", int, np.ndarray)


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


class State(NamedTuple):
    """The coreset between two events."""

    levels: tuple[int, ...] = ()
    drawn: int = 0

    @property
    def stored(self) -> int:
        """Its slots."""
        return sum(self.levels) + (1 if self.drawn else 0)


class _Area:
    """The coreset's level sizes while an event's operations are being planned."""

    def __init__(self, levels: tuple[int, ...], start: int) -> None:
        self.levels = list(levels)
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


class Lazy:
    """Keep the area full: on overflow halve the oldest entries of the most oversized level.

    Target sizes are proportional to rho^(top - level): with rho = 1 every weight level gets the
    same number of slots (recent tokens stay dense), with rho < 1 heavier, older levels get more.
    """

    #: Events between two states that are kept to walk on from.
    STRIDE = 16

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._targets: dict[int, list[float]] = {}
        self._kept = [State()]

    def stored(self, events: Count) -> Count:
        """Coreset slots after `events` >= 1 events: the area is full, since the last halving of an
        event takes only the pairs that it needs."""
        return 0 * events + self.shape.capacity

    def state(self, events: int) -> State:
        """After `events` events, walked to from the nearest kept state."""
        first = min(events // self.STRIDE, len(self._kept) - 1)
        state = self._kept[first]
        for index in range(first * self.STRIDE, events):
            _, state = self.compact(state, self.shape.incoming(index))
            self.keep(index + 1, state)
        return state

    def keep(self, events: int, state: State) -> None:
        """Remember a state after `events` events if it is the next one to walk on from."""
        if events == self.STRIDE * len(self._kept):
            self._kept.append(state)

    def compact(self, state: State, incoming: int) -> tuple[tuple[Op, ...], State]:
        """The operations that take `incoming` tokens in, and the state after them."""
        shape = self.shape
        area = _Area(state.levels, shape.coreset_start)
        area.add(0, incoming)
        excess = sum(area.levels) - shape.capacity
        while excess > 0:
            level = self._most_oversized(area.levels)
            length = min(shape.group, 2 * excess, area.levels[level] & ~1)
            area.halve(level, length)
            excess -= length // 2
        return tuple(area.ops), State(tuple(area.levels))

    def _most_oversized(self, levels: list[int]) -> int:
        """A level with at least one pair; `shape.make_shape` sees to it that there is one."""
        count = len(levels)
        targets = self._targets.get(count)
        if targets is None:
            rho = self.shape.rho
            unit = self.shape.capacity / sum(rho**w for w in reversed(range(count)))
            targets = [unit * rho**w for w in reversed(range(count))]
            self._targets[count] = targets
        found, most = -1, float("-inf")
        for level, (size, target) in enumerate(zip(levels, targets, strict=True)):
            if size >= 2 and size - target > most:
                found, most = level, size - target
        return found


class Paper:
    """Published Express: exact, halve and thin phases with streaming Compress2.

    With the coreset at weight 2^m, thinning level w (base <= w < m, base = max(0, m - m-bar))
    collects groups of n_out * 2^(w + 2 - m) entries and halves each full group into level w + 1;
    the top level's half joins the coreset.  At 4 * n_out the coreset is halved twice and m grows
    by two.  Above m-bar one of every 2^base incoming tokens is drawn uniformly (a reservoir of one
    entry).
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.target = shape.target
        self.inflation = shape.inflation

    def stored(self, events: Count) -> Count:
        """Coreset slots after `events` >= 1 events."""
        taken = self._taken(events)
        if not isinstance(taken, np.ndarray):
            return self._stored(self._phase(taken), taken)
        found = np.empty_like(taken)
        for m in range(self._phase(int(taken.min())), self._phase(int(taken.max())) + 2, 2):
            here = (taken >= self.target << m) & (taken < self.target << (m + 2))
            found[here] = self._stored(m, taken[here])
        return found

    def state(self, events: int) -> State:
        """After `events` events, in closed form: the coreset grows by n_out a cycle of n_out * 2^m
        tokens, and within a cycle the levels count the groups that are full, in base 4."""
        if not events:
            return State()
        taken = self._taken(events)
        m = self._phase(taken)
        base = max(0, m - self.inflation)
        rest = taken % (self.target << m)
        loose = rest % (self._group(base, m) << base)
        levels = [0] * (m + 1)
        levels[base] = loose >> base
        for level in range(base, m - 1):
            levels[level + 1] = self._halves(level, m, rest)
        levels[m] = taken // (self.target << m) * self.target
        return State(tuple(levels), loose % (1 << base))

    def keep(self, events: int, state: State) -> None:
        """Nothing: states are closed forms."""

    def _taken(self, events: Count) -> Count:
        return self.shape.incoming(0) + (events - 1) * self.shape.interval

    def _phase(self, taken: int) -> int:
        """m after `taken` >= 4 * n_out tokens: a phase lasts from n_out * 2^m to 4 times that."""
        return ((taken // self.target).bit_length() - 1) & ~1

    def _stored(self, m: int, taken: Count) -> Count:
        """Slots of `state` in phase m, of one count or of many."""
        base = max(0, m - self.inflation)
        rest = taken % (self.target << m)
        loose = rest % (self._group(base, m) << base)
        slots = taken // (self.target << m) * self.target + -(-loose // (1 << base))
        for level in range(base, m - 1):
            slots += self._halves(level, m, rest)
        return slots

    def _halves(self, level: int, m: int, rest: Count) -> Count:
        """Entries that full groups of `level` have left in the next one; four fill a group there
        and are halved away."""
        group = self._group(level, m)
        return rest // (group << level) % 4 * (group // 2)

    def compact(self, state: State, incoming: int) -> tuple[tuple[Op, ...], State]:
        """The operations that take `incoming` tokens in, and the state after them."""
        area, drawn = _Area(state.levels, self.shape.coreset_start), state.drawn
        if not area.levels:  # the exact phase ends: 4 * n_out points of weight 1
            area.add(0, incoming)
            self._halve_coreset(area, 0)
            return tuple(area.ops), State(tuple(area.levels))
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
        return tuple(area.ops), State(tuple(area.levels), drawn)

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
