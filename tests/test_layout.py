"""Properties of the pure layout: budgets hold, weights add up, chunks do not matter."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from express_vllm.layout import (
    HALVE,
    MIN_SLOTS,
    PROFILES,
    RING_ROWS,
    SCHEDULES,
    Layout,
    layout_for,
    make_shape,
)

shapes = st.builds(
    make_shape,
    st.one_of(st.integers(MIN_SLOTS, 4096), st.sampled_from([128, 512, 1024, 2048])),
    schedule=st.sampled_from(SCHEDULES),
    profile=st.sampled_from(sorted(PROFILES)),
    sinks=st.integers(0, 8),
)


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


def test_ring_is_reserved_before_it_is_written():
    shape = make_shape(512)
    layout = Layout(shape)
    first_row = shape.first_event - RING_ROWS
    assert layout.reserved(first_row) == first_row
    assert layout.reserved(first_row + 1) == shape.slots


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
    ],
)
def test_impossible_shapes_are_refused(bad):
    with pytest.raises(ValueError, match=r"\d|one of"):
        make_shape(bad.pop("slots", 512), **bad)
