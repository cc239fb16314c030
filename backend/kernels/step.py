"""What a step asks of the kernels: `StepPlan` is built once on the host, every layer runs it.

`run_chunks` is one layer's work for prompt chunks, `compact_pages` the compaction of decode steps
for all layers at once.  Requests of a plan share one cache shape; a step with several shapes makes
several plans.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from express_vllm.layout import RING_ROWS, Layout

from . import constants, plan
from .compaction import compact_kernel
from .constants import QUERY_ROWS, SLICES, Model
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

_LOG2E = 1.4426950408889634
#: Bytes of scratch that a decode step's compaction takes for some layers, and for moving pages.
_SCRATCH, _SPARE = 96 << 20, 64 << 20


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


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
    memory: dict[Any, Any] = field(default_factory=dict)  # scratch that all layers use in turn

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once: layers run one after the other."""
        found = self.memory.get(key)
        if found is None:
            found = self.memory[key] = make()
        return found

    @property
    def candidates(self) -> int:
        """Scores that an event has room for."""
        shape = self.tables.layout.shape
        return _cdiv(shape.heavy + max(self.incoming, shape.interval), 16) * 16

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
            upcoming = layout.next_event_position(stop + 1 if compacting else stop)
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


_USUAL = Tuning()


@dataclass
class Scores:
    """What is computed for all events of a step beforehand: query rows [L, instances, KV heads,
    RING_ROWS, d]; scores of the candidates [..., candidates, RING_ROWS], incoming ones filled in;
    maximum and sum of exponentials of the recent tokens [..., RING_ROWS]."""

    rows: Tensor
    score: Tensor
    peak: Tensor
    total: Tensor

    @classmethod
    def make(cls, step: StepPlan, heads: int, size: int, layers: int, dtype: torch.dtype) -> Scores:
        options: Any = {"dtype": torch.float32, "device": step.requests.device}
        if not step.tables.layout.shape.heavy:
            none = torch.empty(1, **options)
            return cls(none.to(dtype), none, none, none)
        leading = (layers, len(step.instances), heads)
        rows = torch.empty(*leading, RING_ROWS, size, dtype=dtype, device=step.requests.device)
        score = torch.empty(*leading, step.candidates, RING_ROWS, **options)
        peak, total = torch.empty(2, *leading, RING_ROWS, **options)
        return cls(rows, score, peak, total)


@dataclass
class Progress:
    """What compaction tells about itself while it runs: see `compact_kernel`."""

    counters: Tensor
    lists: Tensor
    programs: int


@dataclass
class Work:
    """Scratch of a step's compaction, how it is shared out, and its lists."""

    team: int
    tasks: int
    lists: Tensor  # int32 [L, lists, KV heads, width]
    virtual: Tensor
    scratch: Tensor
    shared: Tensor
    progress: Progress

    @classmethod
    def make(cls, step: StepPlan, model: Model, heads: int, layers: int, tuning: Tuning,
             paged: bool) -> Work:  # fmt: skip
        tables, device = step.tables, step.requests.device
        tasks = layers * step.count * heads
        team = 1 if paged else team_size(tasks, tables.width, tuning, device)
        teams = min(tasks, tuning.programs // team)
        pairs = plan.TILE_POINTS // 2
        halvings = constants.HALVINGS if paged and not plan.is_long(tables.layout.shape) else 1
        signs = _cdiv(tables.longest, 2 * pairs) * pairs
        masses = _cdiv(step.candidates, constants.CANDIDATES) * constants.CANDIDATES
        scratch_width, virtual_width = (
            _cdiv(n, 64) * 64
            for n in (
                halvings * pairs * (pairs + 2) + model.padded + signs,
                max(tables.virtual, 1),
            )
        )
        i32: Any = {"dtype": torch.int32, "device": device}
        f32: Any = {"dtype": torch.float32, "device": device}
        before = _cdiv(1 + teams, 4) * 4  # pointers keep their alignment
        counters = torch.zeros(before + step.count * heads, **i32)
        return cls(
            team, tasks, torch.empty(layers, step.lists, heads, step.width, **i32),
            torch.empty(teams * team, 2 * virtual_width, **i32),
            torch.empty(teams * team, scratch_width, **f32),
            torch.empty(teams, 4 * RING_ROWS * SLICES + 2 * virtual_width + masses, **f32),
            Progress(counters, counters[before:], teams * team),
        )  # fmt: skip


def score_recent(
    step: StepPlan, query: Tensor | None, kv_cache: Tensor, source: Source, layers: int,
    scale: float, group: int,
) -> Scores:  # fmt: skip
    heads, size = kv_cache.shape[1], kv_cache.shape[3] // 2
    scores = step.kept(
        ("scores", layers), lambda: Scores.make(step, heads, size, layers, kv_cache.dtype)
    )
    heavy = step.tables.layout.shape.heavy
    if not heavy:
        return scores
    queries = kv_cache if query is None else query
    variant = constants.recent_scores(model_of(kv_cache, group), query is None)
    launch(
        score_recent_kernel, (len(step.instances), heads, layers),
        (
            queries, kv_cache, scores.rows, scores.score, scores.peak, scores.total,
            step.instances, step.requests, step.tables.headers, *source.arguments(),
            *queries.stride()[:2], *kv_cache.stride()[:3], *source.strides, source.table.stride(0),
            scale, heads, len(step.instances), heavy, step.candidates,
        ),
        **variant.options,
    )  # fmt: skip
    return scores


def compact(
    step: StepPlan, scores: Scores, source: Source, heads: int, model: Model, layer_ids: Tensor,
    first_head: int, scale: float, first_layer: int = 0, tuning: Tuning | None = None,
    stream: torch.cuda.Stream | None = None,
) -> tuple[Tensor, Progress]:  # fmt: skip
    """Run a step's events -> lists of kept source indices, int32 [L, lists, KV heads, width].

    layer_ids int64 [L] plus `first_layer` feed the random bits, as does the global index of the
    first KV head.  `stream`: where to run, if not where memory is taken from.  The lists lie in the
    step's memory: the next call overwrites them.
    """
    tuning = tuning or _USUAL
    layers, paged = len(layer_ids), source.block_size > 0
    shape, tables = step.tables.layout.shape, step.tables
    key = ("work", layers, tuning.team, tuning.programs)
    work = step.memory.get(key)
    if work is None:
        work = step.memory[key] = Work.make(step, model, heads, layers, tuning, paged)
    else:
        work.progress.counters.zero_()
    variant = constants.compaction(shape, model, paged)
    if stream:
        stream.wait_stream(torch.cuda.current_stream())
    launch(
        compact_kernel, (work.progress.programs,),
        (
            step.requests, tables.headers, tables.rounds, tables.ops, tables.ids, tables.bias,
            scores.rows, scores.score, scores.peak, scores.total, *source.arguments(), work.lists,
            work.scratch, work.virtual, work.shared, work.progress.counters, work.progress.lists,
            source.value, *source.strides, source.table.stride(0), scale, model.size**-0.5,
            work.tasks, step.count, heads, first_head, first_layer, layer_ids, shape.sinks,
            shape.heavy, len(step.instances), step.lists, step.width, step.candidates,
            work.scratch.shape[1], work.virtual.shape[1] // 2, work.shared.shape[1], work.team,
        ),
        variant.constants, warps=tuning.warps, stages=variant.stages, stream=stream,
    )  # fmt: skip
    return work.lists, work.progress


def model_of(kv_cache: Tensor, group: int) -> Model:
    """kv_cache [blocks, KV heads, block size, 2 d]."""
    return Model(kv_cache.shape[3] // 2, group, kv_cache.element_size(), kv_cache.shape[2])


def team_size(tasks: int, width: int, tuning: Tuning, device: torch.device) -> int:
    """Programs of a team.  All programs of a launch must be on the device together, since members
    wait for each other; a round has `width` halvings to share out."""
    if device.type != "cuda":  # the interpreter runs one program after the other
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
    model = model_of(kv_cache, group)
    progress = None
    if step.events:
        scores = score_recent(step, query, kv_cache, source, 1, scale, group)
        lists, progress = compact(
            step, scores, source, heads, model, source.layer_offsets, first_head, scale, layer,
            tuning, side,
        )  # fmt: skip
    else:
        lists = identity_lists(step, heads, query.device)
    attend_chunks(step, query, source, lists, scale, output, progress if side else None)
    if side and step.events:
        torch.cuda.current_stream().wait_stream(side)
    store_state(step, query, source, lists, kv_cache, table)


def identity_lists(step: StepPlan, heads: int, device: torch.device) -> Tensor:
    """Lists of a step without events: every stored slot is where it was."""

    def make() -> Tensor:
        row = torch.arange(step.width, dtype=torch.int32, device=device)
        return row.expand(1, step.lists, heads, step.width).contiguous()

    return step.kept("identity", make)


def chunk_source(
    step: StepPlan, key: Tensor, value: Tensor, kv_cache: Tensor, table: Tensor
) -> Source:
    """Old slots, copied out of the pages since the step overwrites those, then the new tokens.

    One dense page a request keeps addresses simple; the copy is a hundredth of a chunk's attention.
    Where no request holds old slots, the step's own tensors serve.
    """
    heads, _, width = kv_cache.shape[1:]
    zero, model = step.zero, model_of(kv_cache, 1)
    if not step.old and key.stride() == value.stride() and key.dtype == kv_cache.dtype:
        value_offset = (value.data_ptr() - key.data_ptr()) // key.element_size()
        strides = (0, key.stride(1), key.stride(0))
        if not any(n % 16 for n in (value_offset, *strides)):
            return Source(key, strides, value_offset, zero, table, 0)
    dense = step.kept(
        "dense",
        lambda: torch.empty(
            step.count, heads, step.sources, width, dtype=kv_cache.dtype, device=key.device
        ),
    )
    if step.old:
        launch(
            gather_kernel, (step.count, heads, _cdiv(step.old, constants.MOVED)),
            (
                kv_cache, table, step.requests, dense, *kv_cache.stride()[:3], table.stride(0),
                heads, dense.shape[2],
            ),
            **constants.gather(model).options,
        )  # fmt: skip
    launch(
        append_kernel, (_cdiv(step.tokens, constants.MOVED), heads, step.count),
        (
            key, value, step.requests, dense, *key.stride()[:2], *value.stride()[:2], heads,
            dense.shape[2],
        ),
        **constants.append(model).options,
    )  # fmt: skip
    return Source(dense, dense.stride()[:3], width // 2, zero, table, 0)


def attend_chunks(
    step: StepPlan, query: Tensor, source: Source, lists: Tensor, scale: float, output: Tensor,
    progress: Progress | None = None, variant: constants.Launch | None = None,
) -> None:  # fmt: skip
    """Every token's attention over the state valid at its position, one launch.

    `progress`: of a compaction that may still run; a query tile then waits for its list.
    """
    if not len(step.items):
        return
    heads, size = lists.shape[2], query.shape[2]
    if variant is None:
        model = Model(size, query.shape[1] // heads, query.element_size(), 0)
        variant = constants.prefill(model)
    if progress:
        launch(wait_started_kernel, (1,), (progress.counters, progress.programs), warps=1)
    launch(
        prefill_kernel, (heads, len(step.items)),
        (
            query, source.pages, step.items, step.requests, lists, step.tables.bias,
            progress.lists if progress else lists, output, *query.stride()[:2],
            *output.stride()[:2], source.value, *source.strides, scale * _LOG2E, heads, step.width,
            int(progress is not None),
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
        scatter_kernel, (step.count, heads, max(1, _cdiv(step.final, constants.MOVED))),
        (
            kv_cache, source.pages, table, step.requests, lists, query, *kv_cache.stride()[:3],
            table.stride(0), *source.strides, source.value, *query.stride()[:2], heads, step.width,
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
    scored = len(step.instances) * RING_ROWS * (4 * step.candidates + model.itemsize * size)
    a_layer = heads * (scored + 4 * step.lists * step.width)
    some = max(2, _SCRATCH // a_layer // 2 * 2)  # even, so that pointers keep their alignment
    for first in range(0, len(layer_offsets), some):
        offsets, ids = layer_offsets[first : first + some], layer_ids[first : first + some]
        source = Source(kv_cache, kv_cache.stride()[:3], size, offsets, table, model.block_size)
        scores = score_recent(step, None, kv_cache, source, len(ids), scale, group)
        lists, _ = compact(
            step, scores, source, heads, model, ids, first_head, scale, tuning=tuning
        )
        units = len(ids) * step.count * heads * _cdiv(2 * size, constants.MOVE_COLUMNS)
        bytes_ = step.final * constants.MOVE_COLUMNS * model.itemsize
        programs = min(units, 1056, max(1, _SPARE // bytes_))
        make = functools.partial(
            torch.empty, programs, step.final, constants.MOVE_COLUMNS, dtype=kv_cache.dtype,
            device=kv_cache.device,
        )  # fmt: skip
        spare = step.kept(("spare", programs), make)
        launch(
            move_kernel, (programs,),
            (
                kv_cache, offsets, table, step.requests, lists, spare, *kv_cache.stride()[:3],
                table.stride(0), units, step.count, heads, step.lists, step.width, step.final,
            ),
            **constants.move(model).options,
        )  # fmt: skip


def warm_up(
    layout: Layout, heads: int, group: int, size: int, dtype: torch.dtype, block_size: int,
    device: torch.device,
) -> None:  # fmt: skip
    """Compile what any step of any budget of this layout's kind launches: run a made-up request."""
    shape = layout.shape
    count = shape.first_event + shape.interval
    blocks = _cdiv(shape.slots, block_size)
    options: Any = {"dtype": dtype, "device": device}
    cache = torch.zeros(blocks, heads, block_size, 2 * size, **options)
    table = torch.arange(blocks, dtype=torch.int32, device=device)[None]
    query = torch.ones(count, heads * group, size, **options)
    key, value = torch.ones(2, count, heads, size, **options)
    output = torch.empty_like(query)
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    scale, zero = size**-0.5, torch.zeros(1, dtype=torch.int64, device=device)
    for start, stop in ((0, count - 2), (count - 2, count)):
        chunk = StepPlan.make(layout, [Chunk(start, stop)], group, device)
        run_chunks(
            chunk, query[start:stop], key[start:stop], value[start:stop], cache, table, 0, 0, scale,
            output[start:stop], side=side,
        )  # fmt: skip
    event = StepPlan.make(layout, [Chunk(count, count + 1)], group, device, compacting=True)
    compact_pages(event, cache, zero, zero, table, 0, scale, group)
