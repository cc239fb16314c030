"""A plan's tables, collected request by request on the host."""

from __future__ import annotations

import numpy as np

from express_vllm.layout import Event
from express_vllm.shape import RING_ROWS

from . import tables
from .arguments import Tables
from .events import EventRows, spread, weights
from .span import Span, room


class Writer:
    """Collects the tables of a plan."""

    def __init__(self, with_lists: bool) -> None:
        self.with_lists = with_lists  # else all lists are one: every slot is where it was
        self.requests: list[tables.Request] = []
        self.events: list[tables.Event] = []
        self.tiles: list[np.ndarray] = []
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
            tables.Request(
                first_event=first_event,
                events=len(span.events),
                old=span.old,
                shift=span.shift,
                token=chunk.token,
                dense=self.dense,
                seed_low=chunk.seed & 0xFFFFFFFF,
                seed_high=(chunk.seed >> 32) & 0xFFFFFFFF,
                blocks=chunk.row,
                list=self.lists,
                width=width,
                known=span.known,
                stored=span.stored,
                live=span.final,
                stop=span.stop,
                ring=chunk.layout.ring_start if shape.ring else -1,
                ring_start=span.upcoming - RING_ROWS,
            )
        )
        for event, rows in zip(span.events, span.rows, strict=True):
            self._event(span, owner, event, rows)
        if tile:
            self.tiles += self._tiles(span, owner, width, tile)
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
            tables.Event(
                position=event.position,
                stored=event.incoming_start,
                incoming=event.incoming,
                live=event.live_before,
                after=rows.after,
                round=0,  # of its rows, until they are joined
                rounds=len(rows.rounds),
                final=rows.final,
                bias=self._bias(span, event.before, event.drawn_before),
                sinks=shape.sinks,
                heavy=shape.heavy,
                request=owner,
                kept=min(max(chunk.start - first, 0), RING_ROWS),
                query=chunk.token + first - chunk.start,
                score=self.scored,
                room=size,
            )
        )
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

    def _tiles(self, span: Span, owner: int, width: int, tile: int) -> list[np.ndarray]:
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
            part = np.empty(len(first), tables.TILE)
            part["row"] = chunk.token + first - chunk.start
            part["tokens"] = np.minimum(tile, high - first)
            part["list"] = self.lists + k * width
            stored, bias, recent = 0, 0, 0
            if state is not None:
                stored = state.live_after - window
                bias = self._bias(span, state.levels, state.drawn)
                recent = state.position - window
            part["stored"], part["bias"] = stored, bias
            part["recent"], part["last"] = recent + span.shift, first + span.shift
            part["request"], part["needed"] = owner, 0 if state is None else k + 1
            found.append(part)
        return found

    def arrays(self) -> Tables:
        """The tables, still arrays of records."""
        events, rows = np.array(self.events, tables.EVENT), self.unique
        counts = np.array([(r.ids, len(r.ops), len(r.rounds)) for r in rows], np.int32)
        counts = counts.reshape(-1, 3)
        first_id, first_op, first_round = (counts.cumsum(0, dtype=np.int32) - counts).T
        ops, rounds = (
            _joined([r.ops for r in rows], tables.OP),
            _joined([r.rounds for r in rows], tables.ROUND),
        )
        ops["inputs"] += np.repeat(first_id, counts[:, 1])
        rounds["first_op"] += np.repeat(first_op, counts[:, 2])
        placed = np.array(self.placed, np.intp)
        events["round"] += first_round[placed]
        events["final"] += first_id[placed]
        weight, count = zip(*self.runs, strict=True) if self.runs else ((), ())
        return Tables(
            np.array(self.requests, tables.REQUEST), events, _joined(self.tiles, tables.TILE),
            rounds, ops, spread(np.concatenate([_NO_RUNS, *(r.runs for r in rows)])),
            np.repeat(np.array(weight, np.float32), np.array(count, np.int32)),
        )  # fmt: skip


_NO_RUNS = np.zeros((0, 2), np.int32)


def _joined(arrays: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)
