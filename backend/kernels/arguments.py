"""What kernels are given, in groups: tensors, and counts whose types are declared here
(`launch.py`).  Strides are in elements; a row is a key and, behind it, a value.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl
from torch import Tensor

from express_vllm.softmax import Softmax

LOG2E = 1.4426950408889634


class Tokens(NamedTuple):
    """One row a token and head of the batch: queries, keys, values or outputs [T, heads, d]."""

    data: Tensor
    token: tl.int32  # strides
    head: tl.int32

    @classmethod
    def of(cls, data: Tensor) -> Tokens:
        return cls(data, data.stride(0), data.stride(1))


class Pages(NamedTuple):
    """A layer's cache [blocks, KV heads, block size, 2 d] and its block table int32 [R, blocks]."""

    data: Tensor
    table: Tensor
    page: tl.int64  # strides
    head: tl.int64
    slot: tl.int32
    blocks: tl.int32  # of the table's rows

    @classmethod
    def of(cls, kv_cache: Tensor, table: Tensor) -> Pages:
        page, head, slot, _ = kv_cache.stride()
        return cls(kv_cache, table, page, head, slot, table.stride(0))


class Logits(NamedTuple):
    """A `Softmax`, as `logits.py` reads it.  `scale` takes products q.k to logits; with a cap, to
    the exponent of 2 from which their tanh follows."""

    sinks: Tensor  # [heads] of the first layer; where there are none, unread, as the offsets
    sink_offsets: Tensor  # int64 [L]: element offset of each layer's sinks from `sinks`
    scale: float
    cap: float

    @classmethod
    def of(cls, softmax: Softmax, zero: Tensor, unit: float = 1.0) -> Logits:
        """`zero`: int64 [1] of the device, 0; `unit`: of a natural logit, LOG2E in base 2."""
        cap, sinks, offsets = softmax.cap, softmax.sinks, softmax.offsets
        return cls(
            zero if sinks is None else sinks.detach(), zero if offsets is None else offsets,
            2.0 * LOG2E * softmax.scale / cap if cap else unit * softmax.scale, unit * cap,
        )  # fmt: skip


class Source(NamedTuple):
    """Where a step's keys and values lie: in its dense copy or own tensors, or in the pages of
    several layers."""

    data: Tensor
    layer_offsets: Tensor  # int64 [L]: element offset of each layer's pages from `data`
    table: Tensor  # int32 [R, blocks]
    value: tl.int64  # elements from a key to its value
    page: tl.int64  # strides; 0: not paged
    head: tl.int64
    slot: tl.int32
    blocks: tl.int32  # of the table's rows
    origin: tl.int32  # field of a request that names its first row, where not paged

    @property
    def paged(self) -> bool:
        return self.page > 0


class Tables(NamedTuple):
    """A step's tables (`tables.py`): arrays of records on the host, their words on the device."""

    requests: Any
    events: Any
    tiles: Any
    rounds: Any
    ops: Any
    ids: Any
    bias: Any


class Scores(NamedTuple):
    """What is computed for all events of a step beforehand.

    Query rows [L, events, KV heads, RING_ROWS, d]; scores fp32 [L, KV heads * scored, RING_ROWS] of
    an event's candidates [KV heads, ROOM, RING_ROWS] at KV heads * SCORE, the incoming ones filled
    in; maximum and sum of exponentials of the recent tokens, fp32 [L, events, KV heads, RING_ROWS].
    """

    rows: Tensor
    score: Tensor
    peak: Tensor
    total: Tensor
    events: tl.int32  # of a layer
    scored: tl.int32


class Work(NamedTuple):
    """Scratch of a step's compaction, how it is shared out, and its results.

    `lists` int32 [L, KV heads * entries]: a request's lists [events + 1, KV heads, WIDTH] at
    KV heads * LIST, the first one before its events.
    """

    lists: Tensor
    scratch: Tensor  # fp32 [programs, scratch_width]
    virtual: Tensor  # int32 [programs, 2, virtual_width]
    shared: Tensor  # fp32 [teams, shared_width]: what a team's members share
    counters: Tensor  # int32 zeros: programs that started, then the teams' meetings
    progress: Tensor  # int32 [R, KV heads], zeros before: lists that are written, for one layer
    entries: tl.int32
    scratch_width: tl.int32
    virtual_width: tl.int32
    output_width: tl.int32
    shared_width: tl.int32
    team: tl.int32  # programs of a team


class Decodes(NamedTuple):
    """Decodes of a batch and what their splits leave."""

    live: Tensor  # int32 [R]; 0: padding
    starts: Tensor  # int32 [R, MAX_SEGMENTS]: first slots of segments
    steps: Tensor  # fp32 [R, MAX_SEGMENTS]: rises of log2 w there
    part: Tensor  # fp32 [R, heads, splits, d]
    norm: Tensor  # fp32 [R, heads, splits, 2]: maximum and sum
    splits: tl.int32


class Heads(NamedTuple):
    """The layers, requests and KV heads that a compaction runs: their product is its tasks."""

    layer_ids: Tensor  # int64 [L]: with `first_layer`, global indices
    first_layer: tl.int32
    first_head: tl.int32  # global
    heads: tl.int32
    requests: tl.int32
    tasks: tl.int32
