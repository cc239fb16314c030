"""Properties of the pure layout: budgets hold, weights add up, chunks do not matter."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from express_vllm.layout import MOST_EVENTS, Layout, _events, layout_for
from express_vllm.schedules import HALVE, Lazy, Paper, State
from express_vllm.shape import (
    EXACT_SHAPE,
    MAX_TOKENS,
    MIN_SLOTS,
    PROFILES,
    RING_ROWS,
    SCHEDULES,
    least_interval,
    make_shape,
)

shapes = st.builds(
    make_shape,
    st.one_of(st.integers(MIN_SLOTS, 4096), st.sampled_from([128, 512, 1024, 2048])),
    schedule=st.sampled_from(SCHEDULES),
    profile=st.sampled_from(sorted(PROFILES)),
    sinks=st.integers(0, 8),
)
#: Of 1,024 slots, and all but the least that must be left.
shapes |= st.builds(
    make_shape, st.just(1024), schedule=st.sampled_from(SCHEDULES),
    profile=st.sampled_from(sorted(PROFILES)), pinned=st.integers(0, 896),
)  # fmt: skip


def plan(shape):
    return layout_for(shape)


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 1_000_000))
def test_slots_and_weights(shape, tokens):
    layout = plan(shape)
    segments = layout.segments(tokens)
    assert sum(s.length for s in segments) == layout.live(tokens)
    assert sum(s.length * s.weight for s in segments) == tokens
    assert layout.live(tokens) <= layout.reserved(tokens) <= shape.slots
    if layout.events_done(tokens):
        assert layout.live(tokens) + shape.ring <= shape.slots


@settings(max_examples=30, deadline=None)
@given(shapes)
def test_budget_holds_at_every_count_around_the_first_events(shape):
    layout = plan(shape)
    previous = 0
    for tokens in range(1, shape.first_event + 5 * shape.interval):
        assert layout.live(tokens) <= shape.slots - (
            shape.ring if layout.events_done(tokens) else 0
        )
        assert layout.reserved(tokens) >= previous, "allocated blocks never shrink"
        previous = layout.reserved(tokens)
        if tokens <= shape.first_event:
            assert layout.live(tokens) == tokens, "the exact phase keeps every token"


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 20_000), st.lists(st.integers(1, 3000), max_size=12))
def test_events_do_not_depend_on_the_chunks(shape, start, chunks):
    layout = plan(shape)
    seen, position = [], start
    for chunk in chunks:
        seen += layout.events(position, position + chunk)
        position += chunk
    assert seen == layout.events(start, position)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 400))
def test_event_is_consistent(shape, index):
    layout = plan(shape)
    event = layout.event(index)
    assert event.live_before == layout.live(event.position)
    assert event.live_after + 1 == layout.live(event.position + 1)
    live = event.live_before
    for op in event.ops:
        assert op.start >= 0 and op.start + op.length <= live, "an op stays inside the live slots"
        assert op.length >= 2 if op.kind == HALVE else op.length >= 1
        if op.kind == HALVE:
            assert op.length % 2 == 0
            live -= op.length // 2
        else:
            live -= op.length - 1
    assert live == event.live_after
    incoming_end = event.incoming_start + event.incoming
    assert incoming_end == event.live_before - shape.window, "the window is never compacted"
    assert shape.interval >= RING_ROWS or not shape.ring


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 60_000), st.integers(1, 4000))
def test_counts_are_those_of_the_events(shape, start, length):
    """Closed forms against the events, one by one."""
    layout, stop = plan(shape), start + length
    events = layout.events(start, stop)
    assert layout.thinned(start, stop) == sum(e.live_before - e.live_after for e in events)
    live = [layout.live(tokens) for tokens in range(start, stop)]
    assert layout.attended(start, stop) == (sum(live), max(live))


@pytest.mark.parametrize(
    "options",
    [{"slots": 1024, "interval": 256}, {"slots": 2048, "profile": "even", "interval": 512},
     {"slots": 512, "schedule": "paper", "interval": 256}, {"slots": 128, "schedule": "paper"}],
    ids=str,
)  # fmt: skip
def test_closed_forms_hold_to_ten_million_tokens(options):
    """Against a walk that compacts event after event and knows nothing of closed forms."""
    slots = options["slots"]
    far = 10_000_000 if slots > 128 else 1_500_000  # an event every 32 tokens
    options = {"window": slots // 4, **options} if slots > 128 else options
    layout = Layout(make_shape(**options))
    shape, schedule, state = layout.shape, layout._schedule, State()
    total = 0
    for index in range(layout.events_done(far)):
        stored = shape.coreset_start + state.stored
        _, state = schedule.compact(state, shape.incoming(index))
        after = shape.coreset_start + state.stored + shape.window
        total += stored + shape.incoming(index) + shape.window - after
        assert layout.live(layout.position(index) + 1) == after + 1
        if index % 97 == 0:
            assert layout.thinned(0, layout.position(index) + 1) == total
            assert schedule.state(index + 1) == state
    assert len(state.levels) > 12


def test_queries_of_counts_keep_nothing_and_walk_nothing(monkeypatch):
    for kind in (Lazy, Paper):
        monkeypatch.setattr(kind, "compact", lambda *_: pytest.fail("walked"))
    for schedule in SCHEDULES:
        layout = Layout(make_shape(128, schedule=schedule))
        layout.live(10_000_000), layout.reserved(10_000_000), layout.thinned(5, 10_000_000)
        layout.attended(1, 10_000_000)


@settings(max_examples=30, deadline=None)
@given(shapes, st.lists(st.integers(0, 3000), min_size=1, max_size=12))
def test_events_are_the_same_in_any_order_of_asking(shape, asked):
    walked = [Layout(shape).event(k) for k in asked]
    layout = Layout(shape)
    assert [layout.event(k) for k in asked] == walked
    # A wrong state that was kept on the way would be found here.
    later = [max(asked) + 1, *range(0, max(asked), 500)]
    assert [layout.event(k) for k in later] == [Layout(shape).event(k) for k in later]


def test_events_are_kept_for_a_while_only():
    layout = Layout(make_shape(128))
    for k in range(2 * MOST_EVENTS):
        layout.event(k)
    assert len(_events) <= MOST_EVENTS


def test_a_shape_whose_events_might_never_end_is_refused():
    """16 entries of 17 levels with one entry each cannot be halved: token 524,308."""
    with pytest.raises(ValueError, match=r"leave 16 for the coreset.*at least 24"):
        make_shape(128, heavy=20, window=36, interval=36, group=16)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(128, 400), st.integers(0, 60), st.integers(32, 120), st.integers(32, 120),
    st.sampled_from([2, 4, 16, 64]), st.sampled_from(sorted(PROFILES)),
)  # fmt: skip
def test_every_legal_shape_finds_a_pair_at_the_longest_sequences(
    slots, heavy, window, interval, group, profile
):
    """From a state that is as bad as it can be: one entry in every level, the rest in the last."""
    try:
        shape = make_shape(
            slots, heavy=heavy, window=window, interval=interval, group=group, profile=profile
        )  # fmt: skip
    except ValueError:
        return
    levels = [1] * (MAX_TOKENS.bit_length() - 1)
    levels[0] += max(0, shape.capacity - len(levels))
    _, state = Lazy(shape).compact(State(tuple(levels)), interval)
    assert state.stored == shape.capacity


def test_ring_is_reserved_before_it_is_written():
    shape = make_shape(512)
    layout = Layout(shape)
    first_row = shape.first_event - RING_ROWS
    assert layout.reserved(first_row) == first_row
    assert layout.reserved(first_row + 1) == shape.slots


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 100_000))
def test_the_ring_keeps_the_last_queries_before_an_event(shape, position):
    """Of one position or of many, in any kind of array."""
    layout = plan(shape)
    row = layout.ring_row(position)
    rows = layout.ring_row(np.arange(position, position + 700))
    assert rows[0] == row and rows[500] == layout.ring_row(position + 500)
    assert (layout.ring_row(torch.arange(position, position + 700)).numpy() == rows).all()
    due = np.array([layout.next_event_position(p + 1) for p in range(position, position + 700)])
    if shape.ring:
        assert (rows == RING_ROWS - (due - np.arange(position, position + 700))).all()
        assert layout.ring_start + shape.ring == shape.slots
    else:
        assert (rows < 0).all()


@settings(deadline=None)
@given(st.integers(1, MAX_TOKENS))
def test_an_exact_layout_keeps_every_token(tokens):
    layout = layout_for(EXACT_SHAPE)
    assert layout.shape.exact
    assert tokens == layout.live(tokens) == layout.reserved(tokens)
    assert layout.segments(tokens) == [(tokens, 1, 0.0)]
    assert layout.events(0, tokens) == [] and layout.last_event_position(tokens) == -1
    assert layout.next_event_position(tokens) > MAX_TOKENS and layout.ring_row(tokens) < 0
    assert layout.thinned(0, tokens) == 0
    assert layout.attended(1, tokens + 1) == (tokens * (tokens + 1) // 2, tokens)


def test_paper_schedule_follows_the_published_phases():
    shape = make_shape(1024, schedule="paper")
    layout = Layout(shape)
    n_out = shape.target
    assert shape.first_event == shape.sinks + 4 * n_out + shape.window
    first = layout.event(0)
    assert [(op.length, op.level) for op in first.ops] == [(4 * n_out, 0), (2 * n_out, 1)]
    assert first.levels == (0, 0, n_out)
    peak = 0
    for event in (layout.event(k) for k in range(600)):
        assert event.levels[-1] <= 4 * n_out, "the coreset halves at 4 n_out"
        peak = max(peak, sum(event.levels))
    assert 4 * n_out < peak <= 6 * n_out


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("slots", [128, 512, 1024, 1025, 8192, 100_000])
def test_pinned_tokens_leave_what_a_smaller_cache_has(schedule, slots):
    most = slots - max(MIN_SLOTS, slots // 8)
    without = make_shape(slots, schedule=schedule)
    for pinned in (0, 4, 16, slots // 3, most, most + 4):
        if not pinned - 4 <= most:
            continue
        shape = make_shape(slots, schedule=schedule, pinned=pinned)
        rest = slots - max(pinned - 4, 0)
        smaller = make_shape(rest, schedule=schedule)
        assert shape == replace(smaller, slots=slots, sinks=max(4, pinned))
        assert shape.interval >= least_interval(without), "what tables are reserved for"
        assert shape == without or pinned > 4


@pytest.mark.parametrize(
    "bad",
    [
        {"slots": 64},
        {"schedule": "x"},
        {"profile": "y"},
        {"window": 8},
        {"interval": 8},
        {"group": 3},
        {"heavy": 500},
        {"pinned": 389},
        {"pinned": 128, "window": 256},
        {"slots": 8192, "pinned": 7173},
    ],
)
def test_impossible_shapes_are_refused(bad):
    with pytest.raises(ValueError, match=r"\d|one of"):
        make_shape(bad.pop("slots", 512), **bad)
