"""Host tables that tell the compaction kernel what each event does, cached per cache shape.

An event's slots are data-independent, so the moves of its operations can be composed here: entries
are named by *virtual ids*.  Ids [0, stored + incoming) are the slots after the heavy hitters were
chosen; every halving or draw then names its outputs with fresh ids.  An operation is a list of
input ids, an event's result a list of ids, and no range moves because another one shrank.
Operations that read no output of each other form a *round* and run side by side.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from express_vllm.layout import DRAW, Event, Layout, Shape, layout_for

#: Most points of one halving tile, two for each lane of a warp: the walk never leaves a tile.
TILE_POINTS = 64

#: Columns of `EventTables.headers`, int32.  STORED: slots before the incoming tokens, LIVE: all
#: live slots before the event, AFTER: slots before the exact recent ones after it; ROUND and FINAL
#: are offsets into `rounds` and `ids`, BIAS into `bias` (log2 weights of its stored slots).
POSITION, STORED, INCOMING, LIVE, AFTER, ROUND, ROUNDS, FINAL, BIAS = range(9)
HEADER = 9
#: Columns of `EventTables.ops`: INDEX feeds the random bits; INPUTS is an offset into `ids`.
KIND, LENGTH, SEEN, INDEX, INPUTS, OUTPUT = range(6)
OP = 6

#: Columns of a step's request table, int64 (`step.StepPlan`): first EVENT and number of EVENTS of
#: the step, OLD live slots before it, SHIFT from a position to its source index, batch row of its
#: first TOKEN, seed words, block TABLE row, first LIST row and event INSTANCE, then the state after
#: the step: FINAL_STORED, FINAL_LIVE, token count STOP; first slot of the query RING (-1: none) and
#: the position RING_FROM of its row 0; KNOWN: entries of its first list.
(EVENT, EVENTS, OLD, SHIFT, TOKEN, SEED_LOW, SEED_HIGH, TABLE, LIST, INSTANCE, FINAL_STORED,
 FINAL_LIVE, STOP, RING, RING_FROM, KNOWN) = range(16)  # fmt: skip
REQUEST = 16
#: Columns of a step's event instances, int32: request, event, how many of its query rows lie in the
#: ring, batch row of query row 0 (as if the step held all rows).
INSTANCES = 4
#: Columns of a step's query tiles, int32: batch row of the first token, tokens, list row, stored
#: slots, offset of their log2 weights, source indices of the first exact token and of the first
#: query's own token, request, and how many of its lists must be written.
ITEM = 9


def stored_after(layout: Layout, events: int) -> int:
    """Slots before the exact recent tokens after `events` events; 0 in the exact phase."""
    return layout.event(events - 1).live_after - layout.shape.window if events else 0


class EventTables:
    """Device arrays of a layout's events [0, count); they grow on demand.

    headers [count, HEADER], rounds [n, 2] (first operation, operations), ops [n, OP] and ids [n]
    are int32; bias [n] fp32.  `width` is the widest operation batch: operations of a round.
    """

    def __init__(self, shape: Shape, device: torch.device, width: int) -> None:
        self.layout, self.device, self.width = layout_for(shape), device, width
        self.count = 0
        self.fresh = True  # nothing is on the device yet
        self.ids_used = 0
        self.virtual = 0  # the most virtual ids of an event
        self.longest = 0  # the longest halving
        self._headers: list[list[int]] = []
        self._rounds: list[tuple[int, int]] = []
        self._ops: list[list[int]] = []
        self._ids: list[np.ndarray] = []
        self._bias: list[np.ndarray] = []
        self._bias_used = 0
        self.bias_offsets: list[int] = []
        self._append_bias(0)

    def upto(self, count: int) -> EventTables:
        """Make sure that events [0, count) and the state after them are described."""
        if count > self.count or self.fresh:
            target = max(count, 2 * self.count, 16) if count else 0
            for index in range(self.count, target):
                self._append(self.layout.event(index))
            self.count = target
            self._upload()
            self.fresh = False
        return self

    def bias_offset(self, events: int) -> int:
        """Offset into `bias` of the stored slots' log2 weights after `events` events."""
        return self.bias_offsets[events]

    def _append_bias(self, events: int) -> None:
        if events == 0:
            bias = np.zeros(self.layout.shape.coreset_start, np.float32)
        else:
            event = self.layout.event(events - 1)
            parts = self.layout.segments(event.position + 1)
            logs = [np.full(s.length, s.log2_weight, np.float32) for s in parts]
            bias = np.concatenate(logs)[: event.live_after - self.layout.shape.window]
        self.bias_offsets.append(self._bias_used)
        self._bias.append(bias)
        self._bias_used += len(bias)

    def _append(self, event: Event) -> None:
        base = event.incoming_start + event.incoming
        order = np.arange(base, dtype=np.int32)
        depth = np.zeros(base, np.int32)
        following = base
        planned = []
        for index, op in enumerate(event.ops):
            stop = op.start + op.length
            inputs, level = order[op.start : stop], int(depth[op.start : stop].max())
            kept = 1 if op.kind == DRAW else op.length // 2
            outputs = np.arange(following, following + kept, dtype=np.int32)
            row = [op.kind, op.length, op.seen, index, self._store(inputs), following]
            planned.append((level, op.kind == DRAW or op.length > TILE_POINTS, row))
            following += kept
            order = np.concatenate([order[: op.start], outputs, order[stop:]])
            grown = np.full(kept, level + 1, np.int32)
            depth = np.concatenate([depth[: op.start], grown, depth[stop:]])
            if op.kind != DRAW:
                self.longest = max(self.longest, op.length)
        first_round = len(self._rounds)
        self._add_rounds(planned)
        self.virtual = max(self.virtual, following)
        self._headers.append(
            [
                event.position, event.incoming_start, event.incoming, event.live_before,
                len(order), first_round, len(self._rounds) - first_round, self._store(order),
                self.bias_offsets[event.number],
            ]
        )  # fmt: skip
        self._append_bias(event.number + 1)

    def _store(self, ids: np.ndarray) -> int:
        offset = self.ids_used
        self._ids.append(ids)
        self.ids_used += len(ids)
        return offset

    def _add_rounds(self, planned: list[tuple[int, bool, list[int]]]) -> None:
        """Group operations of equal depth, at most `width` of them; long ones and draws alone."""
        open_level, room = -1, 0
        for level, alone, row in sorted(planned, key=lambda item: item[:2]):
            if alone or level != open_level or not room:
                self._rounds.append((len(self._ops), 0))
                open_level, room = level, 0 if alone else self.width
            first, count = self._rounds[-1]
            self._rounds[-1] = (first, count + 1)
            room -= 1
            if alone:
                open_level = -1
            self._ops.append(row)

    def _upload(self) -> None:
        def rows(values: list, columns: int) -> np.ndarray:
            return np.array(values or [[0] * columns], np.int32).reshape(-1, columns)

        self.headers, self.rounds, self.ops, self.ids, self.bias = to_device(
            [
                rows(self._headers, HEADER), rows(self._rounds, 2), rows(self._ops, OP),
                np.concatenate(self._ids or [np.zeros(1, np.int32)]), np.concatenate(self._bias),
            ],
            self.device,
        )  # fmt: skip


def to_device(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copy arrays in one transfer that the host does not wait for; -> views of the copy."""
    sizes = [-(-max(a.nbytes, 1) // 16) * 16 for a in arrays]
    host = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    at = 0
    for array, size in zip(arrays, sizes, strict=True):
        host.numpy()[at : at + array.nbytes] = (
            np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        )
        at += size
    copy = host.to(device, non_blocking=True)
    views = []
    at = 0
    for array, size in zip(arrays, sizes, strict=True):
        dtype = torch.from_numpy(array[:0]).dtype
        views.append(copy[at : at + array.nbytes].view(dtype).view(array.shape))
        at += size
    return views


def is_long(shape: Shape) -> bool:
    """Whether groups may be longer than a tile, or must be measured as a whole."""
    return shape.schedule == "paper" or shape.group > TILE_POINTS


@lru_cache(maxsize=64)
def tables_for(shape: Shape, device: torch.device) -> EventTables:
    """The shared tables of a shape; a round holds as many halvings as its interval calls for.

    Groups longer than a tile, and those of the published kernel, are measured as a whole: one each.
    """
    if is_long(shape):
        return EventTables(shape, device, 1)
    halvings = 2 * shape.interval // shape.group
    return EventTables(shape, device, 1 << max(0, min(3, (halvings - 1).bit_length())))
