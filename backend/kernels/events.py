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

from express_vllm.layout import Event
from express_vllm.schedules import DRAW
from express_vllm.shape import Shape

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

    ops [n] of `tables.OP`, in the order of rounds [m] of `tables.ROUND`; runs int32 [k, 2] of its
    ids, those of the result from id `final` on.
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
    order = [(0, base, 0)]  # runs of the slots: first id, count, depth
    runs: list[int] = []
    planned: list[tuple[int, bool, int]] = []  # depth, whether alone in its round, index
    rows: list[tables.Op] = []
    ids, following, longest = 0, base, 0
    for index, (kind, start, length, _, seen) in enumerate(event.ops):
        kept = 1 if kind == DRAW else length // 2
        depth = _replace(order, start, length, following, kept, runs)
        planned.append((depth, kind == DRAW or length > TILE_POINTS, index))
        rows.append(tables.Op(kind, length, seen, index, ids, following))
        ids += length
        following += kept
        if kind != DRAW and length > longest:
            longest = length
    after = 0
    for first, count, _ in order:
        runs += first, count
        after += count
    planned.sort()
    ops: list[int] = []
    for _, _, index in planned:
        ops += rows[index]
    return EventRows(
        np.array(ops, np.int32).view(tables.OP),
        np.array(_rounds(planned, width), np.int32).view(tables.ROUND),
        np.array(runs, np.int32).reshape(-1, 2), ids + after, ids, base, after, following - base,
        longest,
    )  # fmt: skip


def _replace(
    order: list[tuple[int, int, int]], start: int, length: int, first_output: int, outputs: int,
    runs: list[int],
) -> int:  # fmt: skip
    """Replace slots [start, start + length) by fresh ids and add the runs of what they held to
    `runs` -> its depth."""
    i = 0
    for _, count, _ in order:
        if start < count:
            break
        start -= count
        i += 1
    depth, j, skip = 0, i, start
    while True:
        first, count, level = order[j]
        j += 1
        here = count - skip
        if level > depth:
            depth = level
        if here >= length:
            break
        runs += first + skip, here
        length -= here
        skip = 0
    runs += first + skip, length
    pieces = [(first_output, outputs, depth + 1)]
    if start:
        pieces.insert(0, (order[i][0], start, order[i][2]))
    if here > length:
        pieces.append((first + skip + length, here - length, level))
    order[i:j] = pieces
    return depth


def _rounds(planned: list[tuple[int, bool, int]], width: int) -> list[int]:
    """First operation and their number, by round: of equal depth and at most `width`; long ones
    and draws alone."""
    rounds: list[int] = []
    open_depth, room = -1, 0
    for i, (depth, alone, _) in enumerate(planned):
        if alone or depth != open_depth or not room:
            rounds += i, 0
            open_depth, room = depth, 0 if alone else width
        rounds[-1] += 1
        room -= 1
        if alone:
            open_depth = -1
    return rounds


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
