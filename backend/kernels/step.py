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
from .compaction import compact_kernel, score_recent_kernel
from .halving import EXPONENTIAL, GAUSSIAN
from .pages import (
    append_kernel,
    gather_kernel,
    keep_rows_kernel,
    move_kernel,
    query_rows_kernel,
    scatter_kernel,
)
from .plan import EventTables, stored_after, tables_for
from .prefill import prefill_kernel

#: Rows of a query tile: tokens times query heads of a KV head.
QUERY_ROWS = 128
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
    count: int
    old: int  # the most live slots a request held before the step
    tokens: int  # the most new tokens of a request
    sources: int  # the most old slots and new tokens of a request
    final: int  # the most live slots a request holds after it
    events: int  # the most events of a request
    lists: int
    width: int  # of a list: stored slots
    incoming: tuple[int, int]  # most incoming tokens of the first event of a layout, of later ones
    starts_exact: bool

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
            old = layout.live(chunk.start)
            shift = old - chunk.start
            upcoming = shape.first_event + end * shape.interval
            final = layout.event(end - 1).live_after if compacting and end else layout.live(stop)
            low, high = chunk.seed & 0xFFFFFFFF, (chunk.seed >> 32) & 0xFFFFFFFF
            requests[r, :15] = (
                begin, end - begin, old, shift, chunk.token, low, high, chunk.row, lists,
                len(instances), stored_after(layout, end), final, stop,
                shape.slots - shape.ring if shape.ring else -1, upcoming - RING_ROWS,
            )  # fmt: skip
            for k in range(begin, end):
                first = layout.event(k).position - RING_ROWS
                kept = min(max(chunk.start - first, 0), RING_ROWS)
                instances.append((r, k, kept, chunk.token + first - chunk.start))
            if not compacting:
                items.append(_items(layout, tables, chunk, r, (begin, end), lists, shift, group,
                                    tile))  # fmt: skip
            stored = [layout.event(k).incoming_start for k in range(begin, end)]
            width = max([width, stored_after(layout, end), stored_after(layout, begin), *stored])
            lists += end - begin + 1
            live = max(live, final)
        late = layout.event(1).incoming if last > 1 else 0
        if shape.schedule == "paper":
            late = max([layout.event(k).incoming for k in range(1, last)], default=0)
        counts = requests[:, plan.STOP] - (requests[:, plan.OLD] - requests[:, plan.SHIFT])
        return cls(
            tables_for(shape, device).upto(last),
            torch.from_numpy(requests).to(device),
            _table(instances, plan.INSTANCES, device),
            torch.from_numpy(np.concatenate(items or [np.zeros((0, plan.ITEM), np.int32)])).to(
                device
            ),
            len(chunks), int(requests[:, 2].max()), int(counts.max()),
            int((counts + requests[:, 2]).max()), live, int(requests[:, 1].max()), lists,
            width, (layout.event(0).incoming if last else 0, late),
            bool(((requests[:, 0] == 0) & (requests[:, 1] > 0)).any()),
        )  # fmt: skip


def _table(rows: list, columns: int, device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(rows, np.int32).reshape(-1, columns)).to(device)


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
        rows.append(part)
    return np.concatenate(rows)


@dataclass
class Source:
    """Where keys and values lie: dense page r of request r, or the pages of several layers."""

    pages: Tensor  # [pages, KV heads, slots, 2 d]
    layer_offsets: Tensor  # int64 [L]: element offset of each layer's pages from `pages`
    table: Tensor  # int32 [R, blocks]
    block_size: int  # 0: dense

    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.pages, self.layer_offsets, self.table

    def strides(self) -> tuple[int, ...]:
        return *self.pages.stride()[:3], self.table.stride(0)


@dataclass
class Tuning:
    """Launch shapes of the compaction kernels."""

    team: int = 0  # programs that share one layer, request and KV head; 0: as `programs` allow
    programs: int = 264  # persistent programs of one launch: more work waits for its turn
    warps: int = 8
    stages: int = 3


def compact(
    step: StepPlan, rows: Tensor, source: Source, layer_ids: Tensor, first_head: int,
    scale: float, first_layer: int = 0, tuning: Tuning | None = None, kernel: str | None = None,
) -> Tensor:  # fmt: skip
    """Run a step's events -> lists of kept source indices, int32 [L, lists, KV heads, width].

    rows [L, instances, KV heads, RING_ROWS, d]: query rows of every event.  layer_ids int64 [L]
    plus `first_layer` feed the random bits, as does the global index of the first KV head.
    """
    tuning = tuning or Tuning()
    layers, heads = len(layer_ids), source.pages.shape[1]
    size = source.pages.shape[3] // 2
    padded = triton.next_power_of_2(size)
    shape, tables = step.tables.layout.shape, step.tables
    device = source.pages.device
    instances = len(step.instances)
    lists = torch.empty(layers, step.lists, heads, step.width, dtype=torch.int32, device=device)
    kind = kernel or ("exponential" if shape.schedule == "paper" else "gaussian")
    first, late = step.incoming
    incoming = max(first if step.starts_exact else 0, late, 1)
    f32 = {"dtype": torch.float32, "device": device}
    score_shape = (layers, max(instances, 1), heads, RING_ROWS)
    peak, total = torch.empty(2, *score_shape, **f32)
    candidates = triton.cdiv(shape.heavy + incoming, 16) * 16 if shape.heavy else 16
    score = torch.empty(*score_shape, candidates, **f32)
    if shape.heavy and instances:
        score_recent_kernel[(instances, heads, layers)](
            rows, score, peak, total, step.instances, step.requests, tables.headers,
            *source.arguments(), *source.strides(), scale, heads, instances, shape.heavy,
            score.shape[-1], size, padded, 64 if padded > 128 else 128, source.block_size,
            num_warps=4, num_stages=2,
        )  # fmt: skip
    tiles = triton.cdiv(tables.longest, plan.TILE_POINTS)
    tasks = layers * step.count * heads
    team = team_size(tasks, tables.width, tuning, device)
    teams = min(tasks, tuning.programs // team)
    group, pairs = triton.cdiv(tables.width, team), plan.PAIRS
    block = 64 if padded > 128 else 128
    scratch_width = 2 * RING_ROWS + group * pairs * (pairs + 2 + tiles) + padded
    score_tiles = triton.next_power_of_2(triton.cdiv(shape.slots, block))
    part = 2 * RING_ROWS * score_tiles
    scratch_width, virtual_width, shared_width = (
        triton.cdiv(max(n, 1), 64) * 64
        for n in (scratch_width, tables.virtual, 2 * part + tables.virtual)
    )
    scratch = torch.empty(teams * team, scratch_width, **f32)
    virtual = torch.empty(teams * team, virtual_width, dtype=torch.int32, device=device)
    shared = torch.empty(teams, shared_width, **f32)
    # The first event of a layout has many more incoming tokens than later ones.
    if step.starts_exact and late and step.events > 1:
        launches = [(0, 1, first), (1, step.events - 1, late)]
    else:
        launches = [(0, max(step.events, 1), first if step.starts_exact else late)]
    for skip, limit, candidates in launches:
        columns = triton.next_power_of_2(max(shape.heavy + candidates, 16))
        arrived = torch.zeros(teams, dtype=torch.int32, device=device)
        compact_kernel[(teams * team,)](
            step.requests, tables.headers, tables.rounds, tables.ops, tables.ids, tables.bias,
            rows, score, peak, total, *source.arguments(), lists, scratch, virtual, shared, arrived,
            *source.strides(), scale, size**-0.5, tasks, step.count, heads, first_head,
            first_layer, layer_ids, shape.sinks, shape.heavy, max(instances, 1), step.lists,
            step.width, score.shape[-1], scratch_width, virtual_width, shared_width,
            skip, limit, size, padded, columns, team, score_tiles, block, group, pairs, tiles,
            source.block_size, HAS_HEAVY=shape.heavy > 0,
            KIND=EXPONENTIAL if kind == "exponential" else GAUSSIAN, WIDE=2048,
            num_warps=tuning.warps, num_stages=tuning.stages,
        )  # fmt: skip
    return lists


def team_size(tasks: int, width: int, tuning: Tuning, device: torch.device) -> int:
    """Programs of a team.  All programs of a launch must be on the device together, since members
    wait for each other; a round has `width` halvings to share out."""
    if device.type != "cuda" or width == 1:
        return 1
    if tuning.team:
        return tuning.team
    team = 1
    while team < width and 2 * team * tasks <= tuning.programs // 4:
        team *= 2
    return team


def query_rows(
    step: StepPlan, query: Tensor | None, kv_cache: Tensor, layer_offsets: Tensor, table: Tensor,
    group: int,
) -> Tensor:  # fmt: skip
    """Query rows of every event of a step, [L, instances, KV heads, RING_ROWS, d], as stored."""
    heads, block_size, size = kv_cache.shape[1], kv_cache.shape[2], kv_cache.shape[3] // 2
    layers, instances = len(layer_offsets), len(step.instances)
    rows = torch.empty(
        layers, max(instances, 1), heads, RING_ROWS, size, dtype=kv_cache.dtype,
        device=kv_cache.device,
    )  # fmt: skip
    if instances and step.tables.layout.shape.heavy:
        queries = kv_cache if query is None else query
        query_rows_kernel[(instances, heads, layers)](
            queries, kv_cache, layer_offsets, table, step.requests, step.instances, rows,
            queries.stride(0), queries.stride(1), *kv_cache.stride()[:3], table.stride(0), heads,
            instances, size, triton.next_power_of_2(size), group, block_size, query is not None,
            num_warps=4,
        )  # fmt: skip
    return rows


def run_chunks(
    step: StepPlan, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, table: Tensor,
    layer: int, first_head: int, scale: float, output: Tensor, tuning: Tuning | None = None,
) -> None:  # fmt: skip
    """One layer's prompt chunks: events, attention, and the state after the step in the pages.

    query, output [T, heads, d]; key, value [T, KV heads, d]; kv_cache [blocks, KV heads, block
    size, 2 d]; table int32 [R, blocks].
    """
    source, lists = advance(
        step, query, key, value, kv_cache, table, layer, first_head, scale, tuning
    )
    attend_chunks(step, query, source, lists, scale, output)


def run_pipelined(
    steps: Sequence[StepPlan], query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor,
    table: Tensor, layer: int, first_head: int, scale: float, output: Tensor,
    side: torch.cuda.Stream, tuning: Tuning | None = None,
) -> None:  # fmt: skip
    """`run_chunks` of consecutive parts of the same chunks: while one part's attention runs, the
    events of the next one are worked off on the stream `side` (of high priority).

    Events are sequential and keep few multiprocessors busy, attention fills the others.
    """
    main = torch.cuda.current_stream()
    side.wait_stream(main)
    kept = []  # tensors of `side` that `main` reads must outlive both
    for step in steps:
        with torch.cuda.stream(side):
            kept.append(
                advance(step, query, key, value, kv_cache, table, layer, first_head, scale, tuning)
            )
            done = side.record_event()
        main.wait_event(done)
        attend_chunks(step, query, *kept[-1], scale, output)
    for source, lists in kept:
        source.pages.record_stream(main)
        lists.record_stream(main)
    side.wait_stream(main)


def advance(
    step: StepPlan, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, table: Tensor,
    layer: int, first_head: int, scale: float, tuning: Tuning | None = None,
) -> tuple[Source, Tensor]:  # fmt: skip
    """Everything of a step but its attention -> what attention reads: the source and the lists."""
    source = chunk_source(step, key, value, kv_cache, table)
    group = query.shape[1] // key.shape[1]
    zero = torch.zeros(1, dtype=torch.int64, device=query.device)
    if step.events:
        rows = query_rows(step, query, kv_cache, zero, table, group)
        lists = compact(step, rows, source, zero, first_head, scale, layer, tuning)
    else:
        lists = identity_lists(step, key.shape[1], query.device)
    store_state(step, source, lists, kv_cache, table)
    if step.tables.layout.shape.ring:
        keep_rows(step, query, kv_cache, table, group)
    return source, lists


def identity_lists(step: StepPlan, heads: int, device: torch.device) -> Tensor:
    """Lists of a step without events: every stored slot is where it was."""
    row = torch.arange(step.width, dtype=torch.int32, device=device)
    return row.expand(1, step.lists, heads, step.width).contiguous()


def chunk_source(
    step: StepPlan, key: Tensor, value: Tensor, kv_cache: Tensor, table: Tensor
) -> Source:
    """Old slots, copied out of the pages since the step overwrites those, then the new tokens.

    One dense page a request keeps addresses simple and rows contiguous; the copy is a hundredth of
    a chunk's attention.
    """
    heads, block_size, width = kv_cache.shape[1:]
    dense = torch.empty(
        step.count, heads, step.sources, width, dtype=kv_cache.dtype, device=key.device
    )
    padded = triton.next_power_of_2(width // 2)
    if step.old:
        gather_kernel[(step.count, heads, triton.cdiv(step.old, 32))](
            kv_cache, table, step.requests, dense, *kv_cache.stride()[:3], table.stride(0), heads,
            dense.shape[2], width // 2, padded, 32, block_size, num_warps=4,
        )  # fmt: skip
    append_kernel[(triton.cdiv(step.tokens, 32), heads, step.count)](
        key, value, step.requests, dense, key.stride(0), key.stride(1), value.stride(0),
        value.stride(1), heads, dense.shape[2], width // 2, padded, 32, num_warps=4,
    )  # fmt: skip
    zero = torch.zeros(1, dtype=torch.int64, device=key.device)
    return Source(dense, zero, table, 0)


def _attention_tile(padded: int, itemsize: int) -> tuple[int, int]:
    """Slots of a tile and pipeline stages that fit a multiprocessor's shared memory (227 KiB)."""
    for block, stages in ((64, 3), (64, 2), (32, 2), (16, 2)):
        if (QUERY_ROWS + 2 * stages * block) * padded * itemsize <= 224 << 10:
            return block, stages
    raise ValueError(f"a head size of {padded} does not fit attention's query tile")


def attend_chunks(
    step: StepPlan, query: Tensor, source: Source, lists: Tensor, scale: float, output: Tensor,
    block: int = 0, warps: int = 0, stages: int = 0,
) -> None:  # fmt: skip
    """Every token's attention over the state valid at its position, one launch."""
    if not len(step.items):
        return
    heads = source.pages.shape[1]
    size = query.shape[2]
    padded = triton.next_power_of_2(size)
    group = query.shape[1] // heads
    usual_block, usual_stages = _attention_tile(padded, query.element_size())
    prefill_kernel[(len(step.items), heads)](
        query, source.pages, step.items, lists, step.tables.bias, output, query.stride(0),
        query.stride(1), output.stride(0), output.stride(1), source.pages.stride(0),
        source.pages.stride(1), scale * _LOG2E, heads, step.width, group, size, padded, QUERY_ROWS,
        block or usual_block, num_warps=warps or 8, num_stages=stages or usual_stages,
    )  # fmt: skip


def store_state(
    step: StepPlan, source: Source, lists: Tensor, kv_cache: Tensor, table: Tensor
) -> None:
    """Write the state after the step to the pages."""
    heads, block_size, width = kv_cache.shape[1:]
    if not step.final:
        return
    scatter_kernel[(step.count, heads, triton.cdiv(step.final, 32))](
        kv_cache, source.pages, table, step.requests, lists, *kv_cache.stride()[:3],
        table.stride(0), source.pages.stride(0), source.pages.stride(1), heads, step.width,
        width // 2, triton.next_power_of_2(width // 2), 32, block_size, num_warps=4,
    )  # fmt: skip


def keep_rows(step: StepPlan, query: Tensor, kv_cache: Tensor, table: Tensor, group: int) -> None:
    """Store the query rows that the event after the step will need."""
    heads, block_size, width = kv_cache.shape[1:]
    keep_rows_kernel[(step.count, heads)](
        query, kv_cache, table, step.requests, query.stride(0), query.stride(1),
        *kv_cache.stride()[:3], table.stride(0), width // 2,
        triton.next_power_of_2(width // 2), group, block_size, num_warps=4,
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
    source = Source(kv_cache, layer_offsets, table, kv_cache.shape[2])
    rows = query_rows(step, None, kv_cache, layer_offsets, table, group)
    lists = compact(step, rows, source, layer_ids, first_head, scale, tuning=tuning)
    layers, heads, columns = len(layer_offsets), kv_cache.shape[1], kv_cache.shape[3]
    units = layers * step.count * heads * triton.cdiv(columns, _MOVE_COLUMNS)
    programs = min(units, 1056)
    spare = torch.empty(
        programs, step.final, _MOVE_COLUMNS, dtype=kv_cache.dtype, device=kv_cache.device
    )
    move_kernel[(programs,)](
        kv_cache, layer_offsets, table, step.requests, lists, spare, *kv_cache.stride()[:3],
        table.stride(0), units, step.count, heads, step.lists, step.width, step.final, columns,
        _MOVE_COLUMNS, 64, kv_cache.shape[2], num_warps=4,
    )  # fmt: skip
    return lists
