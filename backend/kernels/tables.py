"""The records of a step's device tables, as the host fills them; `columns.py` is the kernels' view.

A step has one table of its *requests*, one of their *events* (each request's follow one another),
and one of its *query tiles*.  What an event does lies in four more arrays, which events with the
same rows share (`events.py`): rounds, operations, ids, and `bias`, the log2 weights of stored
slots.

A record is a named tuple here, `dtype` of it is what an array holds: words of one type.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Request(NamedTuple):
    """int64."""

    first_event: int  # in the event table
    events: int
    old: int  # live slots before the step
    shift: int  # from a position to its source index
    token: int  # batch row of its first token
    dense: int  # first row in the step's dense copy
    seed_low: int
    seed_high: int
    blocks: int  # block-table row
    list: int  # offset of its first list, in units of all KV heads
    width: int  # entries of a list
    known: int  # entries in the first one
    stored: int  # after the step, as are the next two
    live: int
    stop: int  # token count
    ring: int  # first slot of the query ring; -1: none
    ring_start: int  # position of its row 0


class Event(NamedTuple):
    """An event of a request, int32."""

    position: int
    stored: int  # slots before the incoming tokens
    incoming: int
    live: int  # all live slots before the event
    after: int  # slots before the exact recent ones after it
    round: int  # its first one
    rounds: int
    final: int  # offset of the result in `ids`
    bias: int  # offset of the stored slots' log2 weights
    sinks: int
    heavy: int
    request: int
    kept: int  # query rows that lie in the ring
    query: int  # batch row of query row 0, as if the step held all rows
    score: int  # offset of its scores in candidates
    room: int  # candidates that a KV head has room for


class Round(NamedTuple):
    """Operations of an event that read no output of each other, int32."""

    first_op: int
    ops: int


class Op(NamedTuple):
    """An operation of an event, int32."""

    kind: int
    length: int
    seen: int
    number: int  # feeds the random bits
    inputs: int  # offset into `ids`
    output: int  # first id


class Tile(NamedTuple):
    """A query tile, int32: consecutive tokens of a request between two events."""

    row: int  # batch row of the first token
    tokens: int
    list: int  # offset, as a request's
    stored: int  # slots
    bias: int  # offset of their log2 weights
    recent: int  # source index of the first exact token
    last: int  # source index of the first query's own token
    request: int
    needed: int  # how many of the request's lists must be written


def _dtype(record: Any, word: type[np.integer]) -> np.dtype:
    return np.dtype([(name, word) for name in record._fields])


REQUEST, EVENT = _dtype(Request, np.int64), _dtype(Event, np.int32)
ROUND, OP, TILE = (_dtype(record, np.int32) for record in (Round, Op, Tile))


def word(dtype: np.dtype) -> np.dtype:
    """The type of a record's words, or of a plain array's."""
    return dtype[0] if dtype.names else dtype


def offsets(dtype: np.dtype) -> dict[str, int]:
    """Of a record's fields, in words from its first one."""
    size = word(dtype).itemsize
    return {name: field[1] // size for name, field in (dtype.fields or {}).items()}
