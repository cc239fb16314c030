"""The streaming oracle: exact while it can be, and the same cache however the tokens arrive."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from express_vllm.layout import Layout
from express_vllm.reference.attention import attend, log_weights
from express_vllm.reference.cache import ExpressCache, draw
from express_vllm.shape import RING_ROWS, make_shape
from express_vllm.softmax import Softmax

HEAD, GROUP = 16, 3


def tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(count, GROUP, HEAD, generator=generator, dtype=torch.float64)
    keys, values = torch.randn(2, count, HEAD, generator=generator, dtype=torch.float64)
    return 2 * queries, 2 * keys, values


def exact(queries, keys, values):
    rows = [
        attend(
            queries[t : t + 1],
            keys[: t + 1],
            values[: t + 1],
            torch.zeros(t + 1, dtype=torch.float64),
            Softmax(HEAD**-0.5),
        )
        for t in range(len(queries))
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("schedule", ["lazy", "paper"])
def test_exact_phase_is_exact_bit_for_bit(schedule):
    shape = make_shape(192, schedule=schedule)
    batch = tokens(shape.first_event + 1)
    outputs = ExpressCache(Layout(shape), HEAD).extend(*batch)
    expected = exact(*batch)
    assert torch.equal(outputs[: shape.first_event], expected[: shape.first_event])
    assert not torch.equal(outputs[shape.first_event], expected[shape.first_event])


def test_query_heads_take_turns_in_choosing_heavy_hitters():
    """Row r of an event is head r mod G: what the others ask there does not matter."""
    layout = Layout(make_shape(160))
    queries, keys, values = tokens(layout.shape.first_event + 1)

    def kept(changed):
        cache = ExpressCache(layout, HEAD)
        cache.extend(changed, keys, values)
        return cache.positions

    rows = layout.shape.first_event - RING_ROWS + torch.arange(RING_ROWS)
    mine = torch.arange(RING_ROWS) % GROUP
    others, own = queries.clone(), queries.clone()
    others[rows] = torch.randn(RING_ROWS, GROUP, HEAD, dtype=torch.float64)
    others[rows, mine] = queries[rows, mine]
    own[rows, mine] = -queries[rows, mine]
    assert torch.equal(kept(others), kept(queries))
    assert not torch.equal(kept(own), kept(queries))


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(["lazy", "paper"]), st.integers(128, 256), st.data())
def test_any_chunking_gives_the_identical_cache(schedule, slots, data):
    layout = Layout(make_shape(slots, schedule=schedule))
    count = data.draw(st.integers(1, 900))
    batch = tokens(count, seed=slots)
    whole = ExpressCache(layout, HEAD, seed=5, layer=2, kv_head=1)
    outputs = whole.extend(*batch)
    parts = ExpressCache(layout, HEAD, seed=5, layer=2, kv_head=1)
    pieces, position = [], 0
    while position < count:
        step = data.draw(st.integers(1, 400))
        pieces.append(parts.extend(*(x[position : position + step] for x in batch)))
        position += step
    assert torch.equal(whole.positions, parts.positions)
    assert torch.equal(whole.keys, parts.keys) and torch.equal(whole.values, parts.values)
    assert torch.equal(outputs, torch.cat(pieces))


@pytest.mark.parametrize("pinned", [0, 30])
@pytest.mark.parametrize("schedule", ["lazy", "paper"])
def test_slots_hold_what_the_layout_says(schedule, pinned):
    layout = Layout(make_shape(160, schedule=schedule, pinned=pinned))
    batch = tokens(1500)
    cache = ExpressCache(layout, HEAD)
    for start in range(0, 1500, 100):
        cache.extend(*(x[start : start + 100] for x in batch))
        assert len(cache.keys) == layout.live(cache.tokens)
        assert len(set(cache.positions.tolist())) == len(cache.positions), "no token twice"
        assert torch.equal(cache.keys, batch[1][cache.positions]), "values never drift"
        recent = torch.arange(cache.tokens - layout.shape.window, cache.tokens)
        assert torch.isin(recent, cache.positions).all(), "the window is exact"
        assert torch.isin(torch.arange(layout.shape.sinks), cache.positions).all()


def test_seed_layer_and_head_choose_differently():
    layout = Layout(make_shape(160))
    batch = tokens(1200)
    kept = set()
    for identity in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**40, 0, 0)]:
        seed, layer, head = identity
        cache = ExpressCache(layout, HEAD, seed=seed, layer=layer, kv_head=head)
        cache.extend(*batch)
        kept.add(tuple(cache.positions.tolist()))
    assert len(kept) == 5


def test_weighted_attention_counts_an_entry_weight_times():
    queries, keys, values = tokens(8)
    layout = Layout(make_shape(160, exponent=1))
    segments = layout.segments(700)
    live = layout.live(700)
    weights = torch.tensor([s.weight for s in segments for _ in range(s.length)])
    keys, values = torch.randn(2, live, HEAD, dtype=torch.float64)
    ours = attend(queries[:1], keys, values, log_weights(segments), Softmax(0.25))[0]
    repeated = (
        torch.repeat_interleave(keys, weights, 0),
        torch.repeat_interleave(values, weights, 0),
    )
    assert repeated[0].shape[0] == 700
    scores = torch.softmax(0.25 * queries[0] @ repeated[0].T, -1)
    assert torch.allclose(ours, scores @ repeated[1], rtol=1e-12, atol=1e-12)


def test_soft_caps_and_sinks_are_those_of_the_formula():
    """Written out number by number; a cap and sinks about as large as the logits."""
    queries, keys, values = tokens(3, seed=2)
    logw, sinks = torch.tensor([0.0, 1.5, 0.7]).double(), torch.tensor([1.0, -math.inf, 3.0])
    ours = attend(queries, keys, values, logw, Softmax(0.4, 1.25, sinks))
    for i in range(3):
        for g in range(GROUP):
            shares = [
                math.exp(1.25 * math.tanh(0.4 * float(queries[i, g] @ keys[j]) / 1.25) + logw[j])
                for j in range(i + 1)
            ]
            total = sum(shares) + math.exp(sinks[g])
            expected = sum(share / total * values[j] for j, share in enumerate(shares))
            assert torch.allclose(ours[i, g], expected, rtol=1e-12, atol=1e-12)


def test_heavy_hitters_are_weighed_by_capped_logits_and_less_for_what_a_sink_takes():
    layout = Layout(make_shape(160))
    batch = tokens(layout.shape.first_event)
    cache = ExpressCache(layout, HEAD, softmax=Softmax(0.4, 1.25, torch.tensor([1.0, 4.0, -9.0])))
    cache.extend(*batch)
    expected = torch.zeros(cache.tokens, dtype=torch.float64)
    for r in range(RING_ROWS):
        last, head = cache.tokens - RING_ROWS + r, r % GROUP
        scores = 0.4 * batch[1][: last + 1] @ batch[0][last, head]
        shares = torch.exp(1.25 * torch.tanh(scores / 1.25))
        expected[: last + 1] += shares / (shares.sum() + math.exp((1.0, 4.0, -9.0)[head]))
    assert torch.allclose(cache.attention_mass(), expected, rtol=1e-12, atol=1e-12)


def test_draw_is_uniform_over_all_tokens_seen():
    """A reservoir fed 3, 5 and 8 tokens keeps each of the 16 equally often."""
    counts = torch.zeros(16)
    for key in range(16_000):
        held, seen = None, 0
        for op, incoming in enumerate((3, 5, 8)):
            members = list(range(seen, seen + incoming))
            entries = members if held is None else [held, *members]
            held = entries[draw(len(entries), seen, key * 2654435761 % 2**32, op)]
            seen += incoming
        counts[held] += 1
    assert counts.min() > 850 and counts.max() < 1150  # 1,000 +- 5 sigma
