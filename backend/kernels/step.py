"""What a step asks of the kernels: `StepPlan` is built once on the host, every layer runs it.

`run_chunks` is one layer's work for prompt chunks, `compact_pages` the compaction of decode steps
for all layers at once.  Requests of a plan share one cache shape; a step with several shapes makes
several plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
from torch import Tensor

from express_vllm.layout import RING_ROWS, Layout

from . import plan
from .compaction import compact_kernel
from .halving import EXPONENTIAL, GAUSSIAN
from .launch import launch
from .pages import (
    append_kernel,
    gather_kernel,
    move_kernel,
    scatter_kernel,
)
from .plan import EventTables, stored_after, tables_for
from .prefill import prefill_kernel, wait_started_kernel
from .selection import score_recent_kernel

#: Rows of a query tile: tokens times query heads of a KV head.
QUERY_ROWS = 128
#: Slices of an event's stored slots; a team has at most as many members.
SLICES = 4
#: Bytes of the keys that one batch of pair differences reads.
_OPERAND = 32 << 10
_LOG2E = 1.4426950408889634


@dataclass
class Chunk:
    """Tokens [start, stop) of a request: batch rows from `token` on, block-table row `row`."""

    start: int
    stop: int
    token: int = 0
    row: int = 0
    seed: int = 0


@dataclass
class StepPlan:
    """Device tables of a step's requests, see `plan.py` for the columns.

    `compacting` plans have no new tokens: each request runs the event at its position `start`.
    """

    tables: EventTables
    requests: Tensor
    instances: Tensor
    items: Tensor
    zero: Tensor  # int64 [1]: 0, the offset of the only layer
    count: int
    old: int  # the most live slots a request held before the step
    tokens: int  # the most new tokens of a request
    sources: int  # the most old slots and new tokens of a request
    final: int  # the most live slots a request holds after it
    events: int  # the most events of a request
    lists: int
    width: int  # of a list: stored slots
    incoming: int  # incoming tokens of the layout's first event if the step has it

    @classmethod
    def make(
        cls, layout: Layout, chunks: Sequence[Chunk], group: int, device: torch.device,
        compacting: bool = False, tile: int = QUERY_ROWS,
    ) -> StepPlan:  # fmt: skip
        """Plan `chunks`, whose query heads are `group` times the KV heads."""
        shape = layout.shape
        requests = np.zeros((len(chunks), plan.REQUEST), np.int64)
        instances: list = []
        items: list = []
        lists, width, live, last = 0, 1, 1, 0
        for r, chunk in enumerate(chunks):
            stop = chunk.start if compacting else chunk.stop
            begin = layout.events_done(chunk.start)
            end = layout.events_done(stop + 1 if compacting else stop)
            last = max(last, end)
            tables = tables_for(shape, device).upto(end)
            known = (
                layout.event(begin).incoming_start if end > begin else stored_after(layout, begin)
            )
            old = layout.live(chunk.start)
            shift = old - chunk.start
            upcoming = shape.first_event + end * shape.interval
            final = layout.event(end - 1).live_after if compacting and end else layout.live(stop)
            low, high = chunk.seed & 0xFFFFFFFF, (chunk.seed >> 32) & 0xFFFFFFFF
            requests[r] = (
                begin, end - begin, old, shift, chunk.token, low, high, chunk.row, lists,
                len(instances), stored_after(layout, end), final, stop,
                shape.slots - shape.ring if shape.ring else -1, upcoming - RING_ROWS, known,
            )  # fmt: skip
            for k in range(begin, end):
                first = layout.event(k).position - RING_ROWS
                kept = min(max(chunk.start - first, 0), RING_ROWS)
                instances.append((r, k, kept, chunk.token + first - chunk.start))
            if not compacting:
                items.append(_items(layout, tables, chunk, r, (begin, end), lists, shift, group,
                                    tile))  # fmt: skip
            stored = [layout.event(k).incoming_start for k in range(begin, end)]
            width = max([width, stored_after(layout, end), known, *stored])
            lists += end - begin + 1
            live = max(live, final)
        counts = requests[:, plan.STOP] - (requests[:, plan.OLD] - requests[:, plan.SHIFT])
        starts_exact = ((requests[:, plan.EVENT] == 0) & (requests[:, plan.EVENTS] > 0)).any()
        requests_, instances_, items_, zero = plan.to_device(
            [
                requests, np.array(instances, np.int32).reshape(-1, plan.INSTANCES),
                np.concatenate(items or [np.zeros((0, plan.ITEM), np.int32)]),
                np.zeros(1, np.int64),
            ],
            device,
        )  # fmt: skip
        return cls(
            tables_for(shape, device).upto(last), requests_, instances_, items_, zero,
            len(chunks), int(requests[:, 2].max()), int(counts.max()),
            int((counts + requests[:, 2]).max()), live, int(requests[:, 1].max()), lists,
            width, layout.event(0).incoming if starts_exact else 0,
        )  # fmt: skip


def _items(
    layout: Layout, tables: EventTables, chunk: Chunk, request: int, events: tuple[int, int],
    first_list: int, shift: int, group: int, tile: int,
) -> np.ndarray:  # fmt: skip
    """Query tiles of a chunk: none crosses an event."""
    tokens = tile // group
    begin, end = events
    rows = []
    for k in range(begin, end + 1):
        low = chunk.start if k == begin else layout.event(k - 1).position
        high = chunk.stop if k == end else layout.event(k).position
        first = np.arange(low, high, tokens)
        recent = layout.event(k - 1).position - layout.shape.window if k else 0
        part = np.empty((len(first), plan.ITEM), np.int32)
        part[:, 0] = chunk.token + first - chunk.start
        part[:, 1] = np.minimum(tokens, high - first)
        part[:, 2] = first_list + k - begin
        part[:, 3] = stored_after(layout, k)
        part[:, 4] = tables.bias_offset(k)
        part[:, 5] = recent + shift
        part[:, 6] = first + shift
        part[:, 7] = request
        part[:, 8] = k - begin + 1 if k else 0
        rows.append(part)
    return np.concatenate(rows)


@dataclass
class Source:
    """Where keys and values lie: dense page r of request r, the step's own tensors, or the pages of
    several layers."""

    pages: Tensor  # [pages, KV heads, slots, ...]: keys; a value `value` elements behind its key
    strides: tuple[int, int, int]  # of a page (0: requests lie in the batch), a head, a slot
    value: int
    layer_offsets: Tensor  # int64 [L]: element offset of each layer's pages from `pages`
    table: Tensor  # int32 [R, blocks]
    block_size: int  # 0: not paged

    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.pages, self.layer_offsets, self.table


@dataclass
class Tuning:
    """Launch shapes of the compaction kernels."""

    team: int = 0  # programs that share one layer, request and KV head; 0: as `programs` allow
    programs: int = 264  # persistent programs of one launch: more work waits for its turn
    warps: int = 8
    stages: int = 3


@dataclass
class Scores:
    """What is computed for all events of a step beforehand: query rows [L, instances, KV heads,
    RING_ROWS, d]; scores of the candidates [..., candidates, RING_ROWS], incoming ones filled in;
    maximum and sum of exponentials of the recent tokens [..., RING_ROWS]."""

    rows: Tensor
    score: Tensor
    peak: Tensor
    total: Tensor


@dataclass
class Progress:
    """What compaction tells about itself while it runs: see `compact_kernel`."""

    counters: Tensor
    lists: Tensor
    programs: int


def score_recent(
    step: StepPlan, query: Tensor | None, kv_cache: Tensor, source: Source, layers: int,
    scale: float, group: int,
) -> Scores:  # fmt: skip
    heads, block_size, size = kv_cache.shape[1], kv_cache.shape[2], kv_cache.shape[3] // 2
    shape, instances, device = step.tables.layout.shape, len(step.instances), kv_cache.device
    if not shape.heavy:
        none = torch.empty(1, dtype=torch.float32, device=device)
        return Scores(none.to(kv_cache.dtype), none[None, None], none, none)
    candidates = triton.cdiv(shape.heavy + max(step.incoming, shape.interval), 16) * 16
    leading = (layers, instances, heads)
    rows = torch.empty(*leading, RING_ROWS, size, dtype=kv_cache.dtype, device=device)
    score = torch.empty(*leading, candidates, RING_ROWS, dtype=torch.float32, device=device)
    peak, total = torch.empty(2, *leading, RING_ROWS, dtype=torch.float32, device=device)
    padded = triton.next_power_of_2(size)
    queries = kv_cache if query is None else query
    launch(
        score_recent_kernel, (instances, heads, layers),
        (
            queries, kv_cache, rows, score, peak, total, step.instances, step.requests,
            step.tables.headers, *source.arguments(), *queries.stride()[:2],
            *kv_cache.stride()[:3], *source.strides, source.table.stride(0), scale, heads,
            instances, shape.heavy, candidates,
        ),
        (size, padded, group, 64 if padded > 128 else 128, source.block_size, block_size,
         query is not None),
        warps=4, stages=2,
    )  # fmt: skip
    return Scores(rows, score, peak, total)


def compact(
    step: StepPlan, scores: Scores, source: Source, heads: int, size: int, layer_ids: Tensor,
    first_head: int, scale: float, first_layer: int = 0, tuning: Tuning | None = None,
    kernel: str | None = None, stream: torch.cuda.Stream | None = None,
) -> tuple[Tensor, Progress]:  # fmt: skip
    """Run a step's events -> lists of kept source indices, int32 [L, lists, KV heads, width].

    layer_ids int64 [L] plus `first_layer` feed the random bits, as does the global index of the
    first KV head.  `stream`: where to run, if not where memory is taken from.
    """
    tuning = tuning or Tuning()
    layers, padded = len(layer_ids), triton.next_power_of_2(size)
    shape, tables, device = step.tables.layout.shape, step.tables, source.pages.device
    kind = kernel or ("exponential" if shape.schedule == "paper" else "gaussian")
    pairs = tables.pairs
    tiles = max(1, triton.cdiv(tables.longest, 2 * pairs))
    tasks = layers * step.count * heads
    team = team_size(tasks, tables.width, tuning, device)
    teams = min(tasks, tuning.programs // team)
    group = triton.cdiv(tables.width, team)
    together = max(1, min(group, _OPERAND // (2 * pairs * padded * source.pages.element_size())))
    columns, first_columns = (
        triton.next_power_of_2(max(shape.heavy + n, 256)) if shape.heavy else 16
        for n in (shape.interval, step.incoming)
    )
    scratch_width = group * pairs * (pairs + 2 + tiles) + padded + max(columns, first_columns)
    scratch_width, virtual_width = (
        triton.cdiv(n, 64) * 64 for n in (scratch_width, max(tables.virtual, 1))
    )
    shared_width = 4 * RING_ROWS * SLICES + 2 * virtual_width
    i32 = {"dtype": torch.int32, "device": device}
    lists = torch.empty(layers, step.lists, heads, step.width, **i32)
    virtual = torch.empty(teams * team, 2 * virtual_width, **i32)
    scratch = torch.empty(teams * team, scratch_width, dtype=torch.float32, device=device)
    shared = torch.empty(teams, shared_width, dtype=torch.float32, device=device)
    counters = torch.zeros(1 + teams + step.count * heads, **i32)
    progress = Progress(counters, counters[1 + teams :], teams * team)
    if stream:
        stream.wait_stream(torch.cuda.current_stream())
    launch(
        compact_kernel, (teams * team,),
        (
            step.requests, tables.headers, tables.rounds, tables.ops, tables.ids, tables.bias,
            scores.rows, scores.score, scores.peak, scores.total, *source.arguments(), lists,
            scratch, virtual, shared, counters, progress.lists,
            source.value, *source.strides, source.table.stride(0), scale, size**-0.5,
            tasks, step.count, heads, first_head, first_layer, layer_ids, shape.sinks, shape.heavy,
            len(step.instances), step.lists, step.width, scores.score.shape[-2], scratch_width,
            virtual_width, shared_width,
        ),
        (
            size, padded, columns, first_columns, team, SLICES, 64 if padded > 128 else 128, group,
            together, pairs,
            min(pairs, 32), tiles, source.block_size, shape.heavy > 0,
            EXPONENTIAL if kind == "exponential" else GAUSSIAN, 2048, layers == 1,
        ),
        warps=tuning.warps, stages=tuning.stages, stream=stream,
    )  # fmt: skip
    return lists, progress


def team_size(tasks: int, width: int, tuning: Tuning, device: torch.device) -> int:
    """Programs of a team.  All programs of a launch must be on the device together, since members
    wait for each other; a round has `width` halvings to share out."""
    if device.type != "cuda" or width == 1:
        return 1
    if tuning.team:
        return tuning.team
    team = 1
    while team < min(width, SLICES) and 2 * team * tasks <= tuning.programs // 4:
        team *= 2
    return team


def run_chunks(
    step: StepPlan, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, table: Tensor,
    layer: int, first_head: int, scale: float, output: Tensor, tuning: Tuning | None = None,
    side: torch.cuda.Stream | None = None,
) -> None:  # fmt: skip
    """One layer's prompt chunks: events, attention, and the state after the step in the pages.

    query, output [T, heads, d]; key, value [T, KV heads, d]; kv_cache [blocks, KV heads, block
    size, 2 d]; table int32 [R, blocks].  With a stream `side` (of high priority) attention runs
    while events are worked off there: they are sequential and keep few multiprocessors busy.  A
    query tile waits for the list that it needs.
    """
    source = chunk_source(step, key, value, kv_cache, table)
    heads, group = key.shape[1], query.shape[1] // key.shape[1]
    progress = None
    if step.events:
        scores = score_recent(step, query, kv_cache, source, 1, scale, group)
        lists, progress = compact(
            step, scores, source, heads, key.shape[2], source.layer_offsets, first_head, scale,
            layer, tuning, stream=side,
        )  # fmt: skip
    else:
        lists = identity_lists(step, heads, query.device)
    attend_chunks(step, query, source, lists, scale, output, progress if side else None)
    if side and step.events:
        torch.cuda.current_stream().wait_stream(side)
    store_state(step, query, source, lists, kv_cache, table)


def run_pipelined(
    steps: Sequence[StepPlan], query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor,
    table: Tensor, layer: int, first_head: int, scale: float, output: Tensor,
    side: torch.cuda.Stream, tuning: Tuning | None = None,
) -> None:  # fmt: skip
    """`run_chunks` of consecutive parts of the same chunks, events on the stream `side`."""
    for step in steps:
        run_chunks(
            step, query, key, value, kv_cache, table, layer, first_head, scale, output, tuning, side
        )


def identity_lists(step: StepPlan, heads: int, device: torch.device) -> Tensor:
    """Lists of a step without events: every stored slot is where it was."""
    row = torch.arange(step.width, dtype=torch.int32, device=device)
    return row.expand(1, step.lists, heads, step.width).contiguous()


def chunk_source(
    step: StepPlan, key: Tensor, value: Tensor, kv_cache: Tensor, table: Tensor
) -> Source:
    """Old slots, copied out of the pages since the step overwrites those, then the new tokens.

    One dense page a request keeps addresses simple; the copy is a hundredth of a chunk's attention.
    Where no request holds old slots, the step's own tensors serve.
    """
    heads, block_size, width = kv_cache.shape[1:]
    zero = step.zero
    if not step.old and key.stride() == value.stride() and key.dtype == kv_cache.dtype:
        value_offset = (value.data_ptr() - key.data_ptr()) // key.element_size()
        return Source(key, (0, key.stride(1), key.stride(0)), value_offset, zero, table, 0)
    dense = torch.empty(
        step.count, heads, step.sources, width, dtype=kv_cache.dtype, device=key.device
    )
    padded = triton.next_power_of_2(width // 2)
    if step.old:
        launch(
            gather_kernel, (step.count, heads, triton.cdiv(step.old, 32)),
            (
                kv_cache, table, step.requests, dense, *kv_cache.stride()[:3], table.stride(0),
                heads, dense.shape[2],
            ),
            (width // 2, padded, 32, block_size), warps=4,
        )  # fmt: skip
    launch(
        append_kernel, (triton.cdiv(step.tokens, 32), heads, step.count),
        (
            key, value, step.requests, dense, *key.stride()[:2], *value.stride()[:2], heads,
            dense.shape[2],
        ),
        (width // 2, padded, 32), warps=4,
    )  # fmt: skip
    return Source(dense, dense.stride()[:3], width // 2, zero, table, 0)


def _attention_tile(padded: int, itemsize: int) -> tuple[int, int, int | None]:
    """Slots of a tile, pipeline stages and registers, so that operands fit a multiprocessor's
    shared memory (227 KiB)."""
    for block, stages in ((64, 3), (64, 2), (32, 2), (16, 2)):
        if (QUERY_ROWS + 2 * stages * block) * padded * itemsize <= 224 << 10:
            return block, stages, None
    raise ValueError(f"a head size of {padded} does not fit attention's query tile")


def attend_chunks(
    step: StepPlan, query: Tensor, source: Source, lists: Tensor, scale: float, output: Tensor,
    progress: Progress | None = None, block: int = 0, warps: int = 8, stages: int = 0,
    registers: int | None = None, rows: int = QUERY_ROWS,
) -> None:  # fmt: skip
    """Every token's attention over the state valid at its position, one launch.

    `progress`: of a compaction that may still run; a query tile then waits for its list.
    """
    if not len(step.items):
        return
    heads, size = lists.shape[2], query.shape[2]
    padded = triton.next_power_of_2(size)
    usual_block, usual_stages, usual_registers = _attention_tile(padded, query.element_size())
    if progress:
        launch(wait_started_kernel, (1,), (progress.counters, progress.programs), warps=1)
    launch(
        prefill_kernel, (heads, len(step.items)),
        (
            query, source.pages, step.items, step.requests, lists, step.tables.bias,
            progress.lists if progress else lists, output, *query.stride()[:2],
            *output.stride()[:2], source.value, *source.strides, scale * _LOG2E, heads, step.width,
        ),
        (query.shape[1] // heads, size, padded, rows, block or usual_block, progress is not None),
        warps=warps, stages=stages or usual_stages, registers=registers or usual_registers,
    )  # fmt: skip


def store_state(
    step: StepPlan, query: Tensor, source: Source, lists: Tensor, kv_cache: Tensor, table: Tensor
) -> None:
    """Write the state after the step, and the next event's query rows, to the pages."""
    heads, block_size, width = kv_cache.shape[1:]
    launch(
        scatter_kernel, (step.count, heads, max(1, triton.cdiv(step.final, 32))),
        (
            kv_cache, source.pages, table, step.requests, lists, query, *kv_cache.stride()[:3],
            table.stride(0), *source.strides, source.value, *query.stride()[:2], heads, step.width,
        ),
        (width // 2, triton.next_power_of_2(width // 2), query.shape[1] // heads, 32, block_size),
        warps=4,
    )  # fmt: skip


#: Bytes of a row that one unit of a move handles: small enough that its rows stay in L2.
_MOVE_COLUMNS = 64


def compact_pages(
    step: StepPlan, kv_cache: Tensor, layer_offsets: Tensor, layer_ids: Tensor, table: Tensor,
    first_head: int, scale: float, group: int, tuning: Tuning | None = None,
) -> Tensor:  # fmt: skip
    """Run the events of a `compacting` step for all layers and rewrite the pages in place.

    kv_cache: the first layer's pages; layer_offsets int64 [L]: element offsets of every layer's
    pages from it; layer_ids int64 [L]: global layer indices.  Returns the lists.
    """
    layers, heads, columns = len(layer_offsets), kv_cache.shape[1], kv_cache.shape[3]
    source = Source(
        kv_cache, kv_cache.stride()[:3], columns // 2, layer_offsets, table, kv_cache.shape[2]
    )
    scores = score_recent(step, None, kv_cache, source, layers, scale, group)
    lists, _ = compact(
        step, scores, source, heads, columns // 2, layer_ids, first_head, scale, tuning=tuning
    )
    units = layers * step.count * heads * triton.cdiv(columns, _MOVE_COLUMNS)
    programs = min(units, 1056)
    spare = torch.empty(
        programs, step.final, _MOVE_COLUMNS, dtype=kv_cache.dtype, device=kv_cache.device
    )
    launch(
        move_kernel, (programs,),
        (
            kv_cache, layer_offsets, table, step.requests, lists, spare, *kv_cache.stride()[:3],
            table.stride(0), units, step.count, heads, step.lists, step.width, step.final,
        ),
        (columns, _MOVE_COLUMNS, 64, kv_cache.shape[2]), warps=4,
    )  # fmt: skip
    return lists
