"""What a step plans for the GPU kernels: rows of events, scratch and how plans are cut to it.

No kernel runs here; `kernel_cases.py` runs them on cut and uncut plans.
"""

from __future__ import annotations

import gc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from budgets import settings as server
from hypothesis import given, settings
from hypothesis import strategies as st

from express_vllm.backend.chunk import Chunk
from express_vllm.backend.kernels import scratch
from express_vllm.backend.kernels.constants import Model
from express_vllm.backend.kernels.events import Kind, RowCache, build, round_width, spread
from express_vllm.backend.kernels.memory import Memory, Workspace
from express_vllm.backend.kernels.plan import StepPlan
from express_vllm.backend.kernels.scores import make_scores
from express_vllm.backend.kernels.span import Span
from express_vllm.backend.kernels.work import make_work
from express_vllm.config import ServerConfig
from express_vllm.layout import Layout, layout_for
from express_vllm.schedules import DRAW
from express_vllm.settings import ATTRIBUTE
from express_vllm.shape import EXACT_SHAPE, PROFILES, make_shape

CPU = torch.device("cpu")
#: An 8B model's KV heads and head size in bf16.
SIDE = scratch.Side(Model(128, 4, 2, 16), 8, CPU)


def naive(event):
    """The event on an explicit list of ids: inputs of each operation, the result."""
    base = event.incoming_start + event.incoming
    order, following, inputs = np.arange(base), base, []
    for op in event.ops:
        stop = op.start + op.length
        kept = 1 if op.kind == DRAW else op.length // 2
        inputs.append(order[op.start : stop])
        fresh = np.arange(following, following + kept)
        order = np.concatenate([order[: op.start], fresh, order[stop:]])
        following += kept
    return inputs, order, following - base


@settings(max_examples=40, deadline=None)
@given(
    st.integers(128, 3000), st.sampled_from(["lazy", "paper"]), st.sampled_from(sorted(PROFILES)),
    st.integers(0, 60),
)  # fmt: skip
def test_rows_are_what_the_operations_do(slots, schedule, profile, number):
    shape = make_shape(slots, schedule=schedule, profile=profile)
    event = layout_for(shape).event(number)
    rows = build(event, round_width(shape))
    ids = spread(rows.runs)
    inputs, order, outputs = naive(event)
    assert rows.ids == len(ids) and rows.outputs == outputs
    assert np.array_equal(ids[rows.final :], order) and rows.after == len(order)
    base = event.incoming_start + event.incoming
    done = base
    for first, count in rows.rounds:
        part = rows.ops[first : first + count]
        for op in part:
            read = ids[op["inputs"] : op["inputs"] + op["length"]]
            assert np.array_equal(read, inputs[op["number"]])
            outputs_of_rounds = {*range(base)} | made(rows.ops[:first])
            assert {*read.tolist()} <= outputs_of_rounds, "a round reads earlier rounds only"
        done += len(made(part))
    assert done == base + outputs
    assert sorted(rows.ops["number"]) == list(range(len(event.ops)))


def made(ops):
    """Ids that operations name."""
    counts = np.where(ops["kind"] == DRAW, 1, ops["length"] // 2)
    starts = ops["output"]
    return {i for s, n in zip(starts.tolist(), counts.tolist(), strict=True)
            for i in range(s, s + n)}  # fmt: skip


def test_rows_of_many_budgets_take_bounded_memory_and_no_rebuilding():
    """10,000 events of 1,000 shapes: at most the limit in bytes.  A step's tables hold what the
    step runs, however many shapes there were before."""
    cache = RowCache(1 << 20)
    asked = 0
    first = None
    for number in range(10):
        for slots in range(128, 1128):
            shape = make_shape(slots)
            cache.get(shape, layout_for(shape).event(number))
            asked += 1
            assert cache.nbytes <= cache.limit
        layout = layout_for(make_shape(512))
        at = layout.event(5).position
        plan = StepPlan.make([Chunk(layout, at, at + 1)], 4, CPU, compacting=True)
        size = sum(x.nbytes for x in plan.tables) - plan.tables.requests.nbytes
        first = first or size
        assert size == first < 10_000
    assert len(cache) < asked


def test_events_of_different_budgets_share_a_plan_of_one_kind_only():
    lazy, paper = Layout(make_shape(256)), Layout(make_shape(256, schedule="paper"))
    chunks = [Chunk(x, 0, 1000) for x in (lazy, Layout(make_shape(700)), Layout(EXACT_SHAPE))]
    plan = StepPlan.make(chunks, 4, CPU)
    assert plan.kind == Kind.of(lazy.shape) and plan.extent.requests == 3
    with pytest.raises(ValueError, match="one kind"):
        StepPlan.make([chunks[0], Chunk(paper, 0, 1000)], 4, CPU)
    mixed = [Span.of(c) for c in (*chunks, Chunk(paper, 0, 1000))]
    lists = scratch.cut(mixed, lambda extent, kind: True)
    assert sorted(len({span.kind for span in some if span.events}) for some in lists) == [1, 1]
    assert sum(map(len, lists)) == 4, "a request without events goes with any"


def test_an_event_pays_for_its_own_width():
    """Only the first event's incoming range is wide: the others of a chunk take no more for it."""
    layout = layout_for(make_shape(100_000))
    first = layout.shape.first_event
    wide = Span.of(Chunk(layout, first, first + 1)).extent
    later = Span.of(Chunk(layout, first + 1, first + 1 + 512)).extent
    both = Span.of(Chunk(layout, first - 100, first - 100 + 32_768)).extent
    assert wide.scored > 5 * later.scored
    assert both.scored == wide.scored + (both.instances - 1) * later.scored


@pytest.mark.parametrize("slots", [128, 2048, 8192, 30_000, 65_536, 100_000, 131_072])
@pytest.mark.parametrize("tokens", [2048, 32_768])
def test_the_worst_mixes_are_cut_to_what_is_reserved(slots, tokens):
    """Every budget up to the largest, alone with the whole step or with others: every plan fits,
    really takes no more, and each request's tokens are there once and in order."""
    cap = 131_072
    largest = make_shape(cap)
    limit = scratch.workspace_bytes(cap, tokens, largest, SIDE)
    workspace = Workspace(limit, CPU)
    layout = layout_for(make_shape(slots))
    start = max(0, layout.shape.first_event - tokens // 2)
    step = [Chunk(layout, start, start + tokens // 2, 0, 0)]
    others = [layout_for(make_shape(n)) for n in (128, slots // 2 + 128, slots)]
    for r in range(24):
        other = others[r % 3]
        at = max(0, other.shape.first_event - 100) + r * other.shape.interval
        step.append(Chunk(other, at, at + tokens // 48, tokens // 2 + r * tokens // 48, r + 1))
    seen: dict[int, int] = {}
    for some in scratch.cut([Span.of(c) for c in step], scratch.chunks_fit(SIDE, limit)):
        plan = StepPlan.of(some, CPU, 32, Memory(CPU, workspace))
        allocate(plan, SIDE)
        assert plan.memory.used <= scratch.chunk_bytes(plan.extent, plan.kind, SIDE) <= limit
        assert sum(x.nbytes for x in plan.tables) <= plan.extent.tables
        for span in some:
            row = span.chunk.row
            assert span.chunk.start == seen.get(row, step[row].start)
            assert span.chunk.token == step[row].token + span.chunk.start - step[row].start
            seen[row] = span.stop
    assert seen == {c.row: c.stop for c in step}


@pytest.mark.parametrize("layers", [1, 7, 32])
def test_events_of_many_decodes_take_what_is_reserved(layers):
    """1,000 decodes at an event, of budgets up to the largest, first events among them."""
    cap = 131_072
    limit = scratch.workspace_bytes(cap, 2048, make_shape(cap), SIDE)
    workspace, due = Workspace(limit, CPU), []
    for r, slots in enumerate([cap, 65_536, *range(128, 128 + 11 * 998, 11)]):
        layout = layout_for(make_shape(slots))
        at = layout.event(r % 3).position
        due.append(Span.of(Chunk(layout, at, at + 1, row=r), compacting=True))
    lists = scratch.cut(due, scratch.decodes_fit(SIDE, limit))
    assert sorted(s.chunk.row for some in lists for s in some) == list(range(1000))
    for some in lists:
        plan = StepPlan.of(some, CPU, 0, Memory(CPU, workspace))
        share = scratch.Compaction.of(plan.extent, SIDE, limit)
        together = min(layers, share.layers)
        found = scratch.sharing(
            plan.extent, plan.kind, SIDE, together, True, limit=share.sharing_limit
        )
        make_scores(plan, SIDE.heads, SIDE.model.size, together, torch.bfloat16)
        make_work(plan, SIDE.heads, together, found)
        programs = max(1, share.spare // scratch.spare_bytes(plan.extent, SIDE))
        plan.memory.empty(programs, scratch.spare_bytes(plan.extent, SIDE), dtype=torch.uint8)
        assert plan.memory.used <= limit
    print(len(lists), "plans in", limit >> 20, "MiB")


def allocate(plan, side):
    """What a chunk's plan takes, with a dense copy."""
    plan.memory.empty(plan.extent.dense, side.heads, 2 * side.model.size, dtype=torch.bfloat16)
    if plan.kind:
        make_scores(plan, side.heads, side.model.size, 1, torch.bfloat16)
        found = scratch.sharing(plan.extent, plan.kind, side, 1, False)
        make_work(plan, side.heads, 1, found)


@pytest.mark.parametrize("pinned", [0, 4000, 7000])
def test_tables_of_a_request_that_pins_tokens_are_reserved(pinned):
    """Its smaller interval means more events for as many live slots."""
    layout, tokens = layout_for(make_shape(8192, pinned=pinned)), 2048
    chunk = Chunk(layout, layout.shape.first_event, layout.shape.first_event + tokens)
    plan = StepPlan.make([chunk], 4, CPU)
    reserved = scratch.table_bytes(8192, tokens, make_shape(8192))
    assert sum(x.nbytes for x in plan.tables) <= reserved


@settings(max_examples=40, deadline=None)
@given(
    st.integers(128, 131_072), st.sampled_from(["lazy", "paper"]), st.integers(1, 2048),
    st.sampled_from([(1, 64), (8, 128), (2, 256)]), st.integers(0, 5), st.floats(0, 1),
)  # fmt: skip
def test_every_request_of_a_server_can_run(slots, schedule, less, heads, number, pinned):
    """One token of any allowed budget, and its decode's event, fit in what is reserved."""
    side = scratch.Side(Model(heads[1], 4, 2, 16), heads[0], CPU)
    cap = make_shape(slots, schedule=schedule)
    limit = scratch.workspace_bytes(slots, 2048, cap, side)
    slots = max(128, slots - less)
    pinned = int((slots - max(128, slots // 8)) * pinned)
    layout = Layout(make_shape(slots, schedule=schedule, pinned=pinned))
    at = layout.shape.first_event + number * layout.shape.interval
    token = Span.of(Chunk(layout, at, at + 1))
    assert scratch.chunk_bytes(token.extent, token.kind, side) <= limit
    decode = Span.of(Chunk(layout, at, at + 1), compacting=True)
    assert scratch.compaction_fits(decode.extent, decode.kind, side, limit)


def test_a_workspace_refuses_a_plan_that_was_not_cut():
    memory = Memory(CPU, Workspace(1000, CPU))
    with pytest.raises(MemoryError, match="a plan needs 1024 bytes of scratch, 1000 are reserved"):
        memory.empty(251, dtype=torch.float32)


def test_a_reused_request_id_with_another_budget_gets_another_row():
    from express_vllm.backend.gpu.decodes import DecodeRows
    from express_vllm.budget import Budget

    def budget(slots):
        return Budget("express", slots, slots, 0, "recent", slots, make_shape(slots))

    def row(rows, slots, position):
        rows.update(np.array([0]), ["x"], [budget(slots)], np.array([position]))
        found = rows.tables(np.array([0]), np.array([position + 1]), 1)
        return found.live.tolist(), found.ring.tolist(), found.starts.tolist()

    fresh, used = DecodeRows(False, 4, CPU), DecodeRows(False, 4, CPU)
    row(used, 512, 700)
    assert row(used, 1024, 698) == row(fresh, 1024, 698)


def config(**express):
    scheduler = SimpleNamespace(max_num_seqs=2, max_num_batched_tokens=512)
    return SimpleNamespace(
        scheduler_config=scheduler, **{ATTRIBUTE: server(ServerConfig(**express))}
    )


def test_shared_memory_dies_with_its_engine():
    from express_vllm.backend.gpu import memory

    one, other = config(), config()
    first, again, second = (memory.EngineMemory.of(x) for x in (one, one, other))
    assert first is again and first is not second
    assert first.decode_scratch(4, 64) is first.decode_scratch(4, 64)
    assert first.decode_scratch(4, 64) is not second.decode_scratch(4, 64)
    part = first.decode_scratch(4, 64).part.untyped_storage()._weak_ref()
    assert not torch.UntypedStorage._expired(part)
    del one, first, again
    gc.collect()
    assert torch.UntypedStorage._expired(part)
    torch.UntypedStorage._free_weak_ref(part)


def test_warm_up_of_a_model_too_short_for_any_budget_runs_exact_requests():
    from express_vllm.backend.gpu.warmup import made_up

    assert made_up(ServerConfig(), 100) is EXACT_SHAPE
    assert made_up(ServerConfig(), 8192).slots == 2048
    assert made_up(ServerConfig(memory_tokens=100_000), 131_072).slots == 2048
    wide = ServerConfig(memory_tokens=100_000, window=50_000)
    assert made_up(wide, 131_072).slots == 100_000
