"""What an event does, in rows that the compaction kernel can follow, and a cache of such rows.

An event's slots are data-independent, so the moves of its operations can be composed here: entries
are named by *virtual ids*.  Ids [0, stored + incoming) are the slots after the heavy hitters were
chosen; every halving or draw then names its outputs with fresh ids.  An operation is a list of
input ids, an event's result a list of ids, and no range moves because another one shrank.
Operations that read no output of each other form a *round* and run side by side.

A list of ids is kept as *runs* (first id, count), some tens of them at any number of slots: a step
writes the ids out (`spread`) for the events that it runs.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from express_vllm.layout import DRAW, Event, Shape

from . import tables

#: Most points of one halving tile, two for each lane of a warp: the walk never leaves a tile.
TILE_POINTS = 64
#: Most halvings of a round: programs of a team share them out.
ROUND_HALVINGS = 8


class Kind(NamedTuple):
    """What of a cache shape is a constant of a kernel: requests of one kind share launches."""

    heavy: bool  # whether there are heavy hitters
    long: bool  # whether groups may be longer than a tile, or must be measured as a whole
    kernel: str  # of the halving

    @classmethod
    def of(cls, shape: Shape) -> Kind:
        long = shape.schedule == "paper" or shape.group > TILE_POINTS
        return cls(shape.heavy > 0, long, shape.kernel)


class EventRows(NamedTuple):
    """An event's rows; offsets into ids and operations are its own.

    ops int32 [n, OP], in the order of rounds int32 [m, 2]; runs int32 [k, 2] of its ids, those of
    the result from id `final` on.
    """

    ops: np.ndarray
    rounds: np.ndarray
    runs: np.ndarray
    ids: int  # how many
    final: int
    base: int  # slots before the first operation: ids from here on are outputs
    after: int  # entries of the result
    outputs: int
    longest: int  # points of the longest halving

    @property
    def nbytes(self) -> int:
        """Of the arrays, with what Python adds to them."""
        return self.ops.nbytes + self.rounds.nbytes + self.runs.nbytes + 1024


def round_width(shape: Shape) -> int:
    """Most halvings of a round: as many as the interval calls for.

    Groups longer than a tile, and those of the published kernel, are measured as a whole: one each.
    """
    if Kind.of(shape).long:
        return 1
    halvings = 2 * shape.interval // shape.group
    return min(ROUND_HALVINGS, 1 << max(0, (halvings - 1).bit_length()))


def build(event: Event, width: int) -> EventRows:
    """Compose the event's operations; at most `width` halvings share a round."""
    base = event.incoming_start + event.incoming
    order = [(0, base, 0)] if base else []  # runs of the slots: first id, count, depth
    runs: list[tuple[int, int]] = []
    planned: list[tuple[int, bool, tuple]] = []
    ids, following, longest = 0, base, 0
    for index, op in enumerate(event.ops):
        draw = op.kind == DRAW
        kept = 1 if draw else op.length // 2
        inputs, depth = _replace(order, op.start, op.length, following, kept)
        row = (op.kind, op.length, op.seen, index, ids, following)
        planned.append((depth, draw or op.length > TILE_POINTS, row))
        runs += inputs
        ids += op.length
        following += kept
        if not draw:
            longest = max(longest, op.length)
    runs += [(first, count) for first, count, _ in order]
    after = sum(count for _, count, _ in order)
    ops, rounds = _rounds(planned, width)
    return EventRows(
        np.array(ops, np.int32).reshape(-1, tables.OP),
        np.array(rounds, np.int32).reshape(-1, 2),
        np.array(runs, np.int32).reshape(-1, 2),
        ids + after, ids, base, after, following - base, longest,
    )  # fmt: skip


def _replace(
    order: list[tuple[int, int, int]], start: int, length: int, first_output: int, outputs: int
) -> tuple[list[tuple[int, int]], int]:
    """Replace slots [start, start + length) by fresh ids -> runs of what they held, its depth."""
    i = 0
    while start >= order[i][1]:
        start -= order[i][1]
        i += 1
    taken, depth, j, skip, left = [], 0, i, start, length
    while left:
        first, count, level = order[j]
        here = min(count - skip, left)
        taken.append((first + skip, here))
        depth = max(depth, level)
        left -= here
        rest = count - skip - here
        skip = 0
        j += 1
    pieces = [(order[i][0], start, order[i][2])] if start else []
    pieces.append((first_output, outputs, depth + 1))
    if rest:
        pieces.append((first + count - rest, rest, level))
    order[i:j] = pieces
    return taken, depth


def _rounds(
    planned: list[tuple[int, bool, tuple]], width: int
) -> tuple[list[tuple], list[list[int]]]:
    """Group operations of equal depth, at most `width` of them; long ones and draws alone."""
    ops: list[tuple] = []
    rounds: list[list[int]] = []
    open_depth, room = -1, 0
    for depth, alone, row in sorted(planned, key=lambda item: item[:2]):
        if alone or depth != open_depth or not room:
            rounds.append([len(ops), 0])
            open_depth, room = depth, 0 if alone else width
        rounds[-1][1] += 1
        room -= 1
        if alone:
            open_depth = -1
        ops.append(row)
    return ops, rounds


def spread(runs: np.ndarray) -> np.ndarray:
    """Runs int32 [k, 2] -> their ids, int32."""
    first, count = runs[:, 0], runs[:, 1]
    ends = np.cumsum(count, dtype=np.int32)
    total = int(ends[-1]) if len(ends) else 0
    ids = np.repeat(first - (ends - count), count)
    ids += np.arange(total, dtype=np.int32)
    return ids


def weights(shape: Shape, levels: tuple[int, ...], drawn: int) -> list[tuple[float, int]]:
    """Runs (log2 weight, count) of the stored slots of a state (`Layout.segments`)."""
    found = [(0.0, shape.coreset_start)]
    found += [(shape.exponent * w, levels[w]) for w in range(len(levels) - 1, -1, -1) if levels[w]]
    if drawn:
        found.append((shape.exponent * math.log2(drawn), 1))
    return found


class RowCache:
    """Rows of the events asked for last, at most `limit` bytes of them.

    They follow from the shape, the levels and drawn entry before the event, and how many tokens
    come in: its number does not matter.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self._rows: OrderedDict[tuple, EventRows] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, shape: Shape, event: Event) -> EventRows:
        key = (shape, event.before, event.drawn_before, event.incoming)
        rows = self._rows.get(key)
        if rows is not None:
            self._rows.move_to_end(key)
            return rows
        rows = self._rows[key] = build(event, round_width(shape))
        self.nbytes += rows.nbytes
        while self.nbytes > self.limit:
            self.nbytes -= self._rows.popitem(last=False)[1].nbytes
        return rows


#: Of this process: thousands of events.
ROWS = RowCache(64 << 20)
