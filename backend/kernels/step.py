"""What a step asks of the kernels: `run_chunks` is one layer's work for prompt chunks,
`compact_pages` the compaction of decode steps for all layers at once.

Both run a `StepPlan` (`plan.py`), which serves requests of any budgets of one kind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from express_vllm.layout import RING_ROWS, Layout

from . import constants, tables
from .compaction import compact_kernel
from .constants import Model
from .launch import launch
from .pages import append_kernel, gather_kernel, move_kernel, scatter_kernel
from .plan import Chunk, Extent, Span, StepPlan, cdiv
from .prefill import prefill_kernel, wait_started_kernel
from .scratch import USUAL, Compaction, Sharing, Side, Tuning, sharing, spare_bytes
from .selection import score_recent_kernel

__all__ = [
    "Chunk", "Extent", "Source", "Span", "StepPlan", "Tuning", "attend_chunks", "chunk_source",
    "compact", "compact_pages", "identity_lists", "model_of", "run_chunks", "score_recent",
    "store_state", "warm_up",
]  # fmt: skip

_LOG2E = 1.4426950408889634
#: Columns of a request that may name its first row (`Source.origin`).
_ORIGINS = tables.offsets(tables.REQUEST)
#: Most programs of a launch that moves rows: requests of a plan may differ much in size.
_MOVERS = 16384
#: Times a layer's compaction: a context, given the stream on which it ends.
Timer = Callable[[torch.cuda.Stream | None], contextlib.AbstractContextManager[None]]


@dataclass
class Source:
    """Where keys and values lie: the step's dense copy or own tensors, or the pages of several
    layers."""

    pages: Tensor  # [..., 2 d]: keys; a value `value` elements behind its key
    strides: tuple[int, int, int]  # of a page (0: not paged), a head, a slot
    value: int
    layer_offsets: Tensor  # int64 [L]: element offset of each layer's pages from `pages`
    table: Tensor  # int32 [R, blocks]
    block_size: int  # 0: not paged
    origin: int = 0  # column of a request's first row, not paged

    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.pages, self.layer_offsets, self.table


@dataclass
class Scores:
    """What is computed for all events of a step beforehand: query rows [L, instances, KV heads,
    RING_ROWS, d]; scores of each event's candidates [L, KV heads * scored, RING_ROWS], incoming
    ones filled in; maximum and sum of exponentials of the recent tokens [L, instances, KV heads,
    RING_ROWS]."""

    rows: Tensor
    score: Tensor
    peak: Tensor
    total: Tensor

    @classmethod
    def make(cls, step: StepPlan, heads: int, size: int, layers: int, dtype: torch.dtype) -> Scores:
        extent, empty, f32 = step.extent, step.memory.empty, torch.float32
        if not (step.kind and step.kind.heavy):
            none = empty(1, dtype=f32)
            return cls(empty(1, dtype=dtype), none, none, none)
        leading = (layers, extent.instances, heads)
        peak, total = empty(2, *leading, RING_ROWS, dtype=f32)
        return cls(
            empty(*leading, RING_ROWS, size, dtype=dtype),
            empty(layers, heads * extent.scored, RING_ROWS, dtype=f32), peak, total,
        )  # fmt: skip


@dataclass
class Progress:
    """What compaction tells about itself while it runs: see `compact_kernel`."""

    counters: Tensor
    lists: Tensor
    programs: int


@dataclass
class Work:
    """Scratch of a step's compaction, how it is shared out, and its lists."""

    sharing: Sharing
    lists: Tensor  # int32 [L, KV heads * entries]
    virtual: Tensor
    scratch: Tensor
    shared: Tensor
    progress: Progress

    @classmethod
    def make(cls, step: StepPlan, heads: int, layers: int, found: Sharing) -> Work:
        empty, i32, f32 = step.memory.empty, torch.int32, torch.float32
        counters = empty(found.counters, dtype=i32)
        heard = counters[found.counters - step.extent.requests * heads :]
        return cls(
            found, empty(layers, heads * step.extent.lists, dtype=i32),
            empty(found.programs, 2 * found.virtual, dtype=i32),
            empty(found.programs, found.scratch, dtype=f32),
            empty(found.teams, found.shared, dtype=f32),
            Progress(counters, heard, found.programs),
        )  # fmt: skip


def score_recent(
    step: StepPlan, query: Tensor | None, kv_cache: Tensor, source: Source, layers: int,
    scale: float, group: int,
) -> Scores:  # fmt: skip
    heads, size = kv_cache.shape[1], kv_cache.shape[3] // 2
    scores = step.kept(
        ("scores", layers), lambda: Scores.make(step, heads, size, layers, kv_cache.dtype)
    )
    if not (step.kind and step.kind.heavy):
        return scores
    queries = kv_cache if query is None else query
    variant = constants.recent_scores(model_of(kv_cache, group), query is None)
    launch(
        score_recent_kernel, (step.extent.instances, heads, layers),
        (
            queries, kv_cache, scores.rows, scores.score, scores.peak, scores.total,
            step.requests, step.events, *source.arguments(),
            *queries.stride()[:2], *kv_cache.stride()[:3], *source.strides, source.table.stride(0),
            scale, heads, step.extent.instances, step.extent.scored, source.origin,
        ),
        **variant.options,
    )  # fmt: skip
    return scores


def compact(
    step: StepPlan, scores: Scores, source: Source, heads: int, model: Model, layer_ids: Tensor,
    first_head: int, scale: float, first_layer: int = 0, tuning: Tuning | None = None,
    stream: torch.cuda.Stream | None = None, limit: int | None = None,
) -> tuple[Tensor, Progress]:  # fmt: skip
    """Run a step's events -> lists of kept source indices, int32 [L, KV heads * entries].

    layer_ids int64 [L] plus `first_layer` feed the random bits, as does the global index of the
    first KV head.  `stream`: where to run, if not where memory is taken from; `limit`: bytes of the
    programs' scratch.  The lists lie in the step's memory: the next call overwrites them.
    """
    tuning = tuning or USUAL
    layers, paged = len(layer_ids), source.block_size > 0
    assert step.kind, "a step without events has nothing to compact"
    kind = step.kind

    def make() -> Work:
        side = Side(model, heads, step.requests.device)
        found = sharing(step.extent, kind, side, layers, paged, tuning, limit)
        return Work.make(step, heads, layers, found)

    work = step.kept(("work", layers, tuning), make)
    found, extent = work.sharing, step.extent
    work.progress.counters.zero_()
    variant = constants.compaction(kind, model, paged)
    if stream:
        stream.wait_stream(torch.cuda.current_stream())
    launch(
        compact_kernel, (found.programs,),
        (
            step.requests, step.events, step.rounds, step.ops, step.ids, step.bias,
            scores.rows, scores.score, scores.peak, scores.total, *source.arguments(), work.lists,
            work.scratch, work.virtual, work.shared, work.progress.counters, work.progress.lists,
            source.value, *source.strides, source.table.stride(0), scale, model.size**-0.5,
            found.tasks, extent.requests, heads, first_head, first_layer, layer_ids,
            extent.instances, extent.lists, extent.scored, found.scratch, found.virtual,
            found.outputs, found.shared, found.team, source.origin,
        ),
        variant.constants, warps=tuning.warps, stages=variant.stages, stream=stream,
    )  # fmt: skip
    return work.lists, work.progress


def model_of(kv_cache: Tensor, group: int) -> Model:
    """kv_cache [blocks, KV heads, block size, 2 d]."""
    return Model(kv_cache.shape[3] // 2, group, kv_cache.element_size(), kv_cache.shape[2])


def run_chunks(
    step: StepPlan, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, table: Tensor,
    layer: int, first_head: int, scale: float, output: Tensor, tuning: Tuning | None = None,
    side: torch.cuda.Stream | None = None, timed: Timer | None = None,
) -> None:  # fmt: skip
    """One layer's prompt chunks: events, attention, and the state after the step in the pages.

    query, output [T, heads, d]; key, value [T, KV heads, d]; kv_cache [blocks, KV heads, block
    size, 2 d]; table int32 [R, blocks].  With a stream `side` (of high priority) attention runs
    while events are worked off there: they are sequential and keep few multiprocessors busy.  A
    query tile waits for the list that it needs.  `timed`: a context around the events, given the
    stream on which they end.
    """
    source = chunk_source(step, key, value, kv_cache, table)
    heads, group = key.shape[1], query.shape[1] // key.shape[1]
    model = model_of(kv_cache, group)
    progress = None
    if step.kind:
        with timed(side) if timed else contextlib.nullcontext():
            scores = score_recent(step, query, kv_cache, source, 1, scale, group)
            lists, progress = compact(
                step, scores, source, heads, model, source.layer_offsets, first_head, scale, layer,
                tuning, side,
            )  # fmt: skip
    else:
        lists = identity_lists(step)
    attend_chunks(step, query, source, lists, heads, scale, output, progress if side else None)
    if side and step.kind:
        torch.cuda.current_stream().wait_stream(side)
    store_state(step, query, source, lists, kv_cache, table)


def identity_lists(step: StepPlan) -> Tensor:
    """The one list of a step without events: every stored slot is where it was."""
    device = step.requests.device
    return step.kept(
        "identity",
        lambda: torch.arange(step.extent.width, dtype=torch.int32, device=device),
    )


def chunk_source(
    step: StepPlan, key: Tensor, value: Tensor, kv_cache: Tensor, table: Tensor
) -> Source:
    """Old slots, copied out of the pages since the step overwrites those, then the new tokens.

    Dense rows keep addresses simple; the copy is a hundredth of a chunk's attention.  Where no
    request holds old slots, the step's own tensors serve.
    """
    heads, _, width = kv_cache.shape[1:]
    extent, zero, model = step.extent, step.zero, model_of(kv_cache, 1)
    if not extent.old and key.stride() == value.stride() and key.dtype == kv_cache.dtype:
        value_offset = (value.data_ptr() - key.data_ptr()) // key.element_size()
        strides = (0, key.stride(1), key.stride(0))
        if not any(n % 8 for n in (value_offset, *strides)):
            return Source(key, strides, value_offset, zero, table, 0, _ORIGINS["token"])
    dense = step.kept(
        "dense", lambda: step.memory.empty(extent.dense, heads, width, dtype=kv_cache.dtype)
    )
    if extent.old:
        launch(
            gather_kernel, movers(extent, heads, extent.old),
            (
                kv_cache, table, step.requests, dense, *kv_cache.stride()[:3], table.stride(0),
                heads,
            ),
            **constants.gather(model).options,
        )  # fmt: skip
    launch(
        append_kernel, movers(extent, heads, extent.tokens),
        (key, value, step.requests, dense, *key.stride()[:2], *value.stride()[:2], heads),
        **constants.append(model).options,
    )  # fmt: skip
    strides = (0, dense.stride(1), dense.stride(0))
    return Source(dense, strides, width // 2, zero, table, 0, _ORIGINS["dense"])


def movers(extent: Extent, heads: int, rows: int) -> tuple[int, int, int]:
    """Grid of a kernel that moves up to `rows` rows of each request and head.  A program strides
    over its request's, so that the longest one does not set the number of idle programs."""
    most = max(1, _MOVERS // (extent.requests * heads))
    return extent.requests, heads, max(1, min(cdiv(rows, constants.MOVED), most))


def attend_chunks(
    step: StepPlan, query: Tensor, source: Source, lists: Tensor, heads: int, scale: float,
    output: Tensor, progress: Progress | None = None, variant: constants.Launch | None = None,
) -> None:  # fmt: skip
    """Every token's attention over the state valid at its position, one launch; `heads`: KV heads.

    `progress`: of a compaction that may still run; a query tile then waits for its list.
    """
    if not step.tiles:
        return
    size = query.shape[2]
    if variant is None:
        model = Model(size, query.shape[1] // heads, query.element_size(), 0)
        variant = constants.prefill(model)
    if progress:
        launch(wait_started_kernel, (1,), (progress.counters, progress.programs), warps=1)
    launch(
        prefill_kernel, (heads, step.tiles),
        (
            query, source.pages, step.items, step.requests, lists, step.bias,
            progress.lists if progress else lists, output, *query.stride()[:2],
            *output.stride()[:2], source.value, *source.strides[1:], scale * _LOG2E, heads,
            source.origin, int(progress is not None),
        ),
        **variant.options,
    )  # fmt: skip


def store_state(
    step: StepPlan, query: Tensor, source: Source, lists: Tensor, kv_cache: Tensor, table: Tensor
) -> None:
    """Write the state after the step, and the next event's query rows, to the pages."""
    heads = kv_cache.shape[1]
    model = model_of(kv_cache, query.shape[1] // heads)
    launch(
        scatter_kernel, movers(step.extent, heads, step.extent.final),
        (
            kv_cache, source.pages, table, step.requests, lists, query, *kv_cache.stride()[:3],
            table.stride(0), *source.strides[1:], source.value, *query.stride()[:2], heads,
            source.origin,
        ),
        **constants.scatter(model).options,
    )  # fmt: skip


def compact_pages(
    step: StepPlan, kv_cache: Tensor, layer_offsets: Tensor, layer_ids: Tensor, table: Tensor,
    first_head: int, scale: float, group: int, tuning: Tuning | None = None,
) -> None:  # fmt: skip
    """Run the events of a `compacting` step for all layers and rewrite the pages in place.

    kv_cache: the first layer's pages; layer_offsets int64 [L]: element offsets of every layer's
    pages from it; layer_ids int64 [L]: global layer indices.  As many layers at a time as scratch
    has room for.
    """
    heads, size, model = kv_cache.shape[1], kv_cache.shape[3] // 2, model_of(kv_cache, group)
    side = Side(model, heads, kv_cache.device)
    workspace = step.memory.workspace
    share = Compaction.of(step.extent, side, workspace.size if workspace else None)
    for first in range(0, len(layer_offsets), share.layers):
        offsets, ids = (x[first : first + share.layers] for x in (layer_offsets, layer_ids))
        if ("scores", len(ids)) not in step.cached:
            step.memory.restart()
        source = Source(kv_cache, kv_cache.stride()[:3], size, offsets, table, model.block_size)
        scores = score_recent(step, None, kv_cache, source, len(ids), scale, group)
        lists, _ = compact(
            step, scores, source, heads, model, ids, first_head, scale, tuning=tuning,
            limit=share.sharing_limit,
        )  # fmt: skip
        _move(step, kv_cache, offsets, table, lists, model, share.spare)


def _move(
    step: StepPlan, kv_cache: Tensor, offsets: Tensor, table: Tensor, lists: Tensor, model: Model,
    spare_limit: int,
) -> None:  # fmt: skip
    """Rewrite the pages of some layers as the lists say."""
    extent, heads = step.extent, kv_cache.shape[1]
    slices = cdiv(2 * model.size, constants.MOVE_COLUMNS)
    units = len(offsets) * extent.requests * heads * slices
    side = Side(model, heads, kv_cache.device)
    programs = min(units, 1056, max(1, spare_limit // spare_bytes(extent, side)))
    spare = step.kept(
        ("spare", len(offsets)),
        lambda: step.memory.empty(
            programs, extent.final, constants.MOVE_COLUMNS, dtype=kv_cache.dtype
        ),
    )
    launch(
        move_kernel, (programs,),
        (
            kv_cache, offsets, table, step.requests, lists, spare, *kv_cache.stride()[:3],
            table.stride(0), units, extent.requests, heads, extent.lists, extent.final,
        ),
        **constants.move(model).options,
    )  # fmt: skip


def warm_up(
    layout: Layout, count: int, heads: int, group: int, size: int, dtype: torch.dtype,
    block_size: int, device: torch.device,
) -> None:  # fmt: skip
    """Compile what any step of any budget of this layout's kind launches: run a made-up request of
    `count` tokens.  One that reaches no event needs no more than its kernels."""
    blocks = cdiv(min(layout.shape.slots, count + 1), block_size)
    options: Any = {"dtype": dtype, "device": device}
    cache = torch.zeros(blocks, heads, block_size, 2 * size, **options)
    table = torch.arange(blocks, dtype=torch.int32, device=device)[None]
    query = torch.ones(count, heads * group, size, **options)
    key, value = torch.ones(2, count, heads, size, **options)
    output = torch.empty_like(query)
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    scale, zero = size**-0.5, torch.zeros(1, dtype=torch.int64, device=device)
    for start, stop in ((0, count - 2), (count - 2, count)):
        chunk = StepPlan.make([Chunk(layout, start, stop)], group, device)
        run_chunks(
            chunk, query[start:stop], key[start:stop], value[start:stop], cache, table, 0, 0, scale,
            output[start:stop], side=side,
        )  # fmt: skip
    if layout.events(count, count + 1):
        event = StepPlan.make([Chunk(layout, count, count + 1)], group, device, compacting=True)
        compact_pages(event, cache, zero, zero, table, 0, scale, group)
