"""The quality harness on a tiny random model: what would make its numbers worthless fails here."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_gemma, tiny_llama

from bench.quality import bound, error, harness, nll, presses, recall
from bench.quality.caches import Accumulated, EvictingCache, WindowCache, causal
from bench.quality.harness import Heads, Stream
from bench.quality.methods import METHODS
from bench.quality.policies import Policy, title
from bench.quality.run import Run
from express_vllm.layout import layout_for
from express_vllm.reference.cache import ExpressCache

SLOTS, LENGTH = 128, 300


@pytest.fixture(scope="module")
def model():
    return tiny_llama(2)


@pytest.fixture(scope="module")
def heads(model):
    return harness.heads_of(model)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 97, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def feed(model, heads, name, slots, ids, chunk=LENGTH):
    stream = Stream(model, Policy.parse(name, slots).caches(heads))
    return stream.feed(ids, chunk), stream


def own(model, ids):
    """The model's logits with transformers' own attention."""
    model.set_attn_implementation("sdpa")
    try:
        return model(ids).logits
    finally:
        model.set_attn_implementation(harness.ATTENTION)


def rows(count, seed=0, batch=1, heads=6, kv=2, size=16):
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(batch, heads, count, size, generator=generator)
    key, value = torch.randn(2, batch, kv, count, size, generator=generator)
    return query, key, value


def weights(query, keys):
    """Causal attention weights of all positions, [B, KV heads, group, T, T]."""
    group = query.shape[1] // keys.shape[1]
    scores = query.unflatten(1, (-1, group)) @ keys[:, :, None].mT * query.shape[-1] ** -0.5
    return scores.masked_fill(~causal(*scores.shape[-2:], query.device), -math.inf).softmax(-1)


def test_exact_is_the_model(model, heads, ids):
    for chunk in (LENGTH, 37):
        hidden, _ = feed(model, heads, "exact", 0, ids, chunk)
        assert torch.allclose(model.lm_head(hidden), own(model, ids), atol=1e-5)


def test_layers_with_a_window_keep_it(ids):
    """Caches are made for the others."""
    gemma = tiny_gemma(["sliding_attention", "sliding_attention", "full_attention"], window=20)
    heads = harness.heads_of(gemma)
    assert heads.layers == 1
    for chunk in (LENGTH, 37):
        hidden, stream = feed(gemma, heads, "exact", 0, ids, chunk)
        assert torch.allclose(gemma.lm_head(hidden), own(gemma, ids), atol=1e-5)
        assert [len(stream.windows), stream.peak] == [2, LENGTH]
    thinned, stream = feed(gemma, heads, "express", 256, ids)
    assert stream.peak <= 256 and not torch.allclose(thinned, hidden, atol=1e-3)
    twin = stream.fork()
    twin.feed(ids[:, :9])
    assert stream.windows[0] is not twin.windows[0]


@pytest.mark.parametrize("name", [*(n for n in METHODS if n != "exact"), "keydiff:shared=1"])
def test_a_budget_that_fits_is_exact_and_one_that_does_not_is_kept(model, heads, ids, name):
    exact, _ = feed(model, heads, "exact", 0, ids)
    roomy, _ = feed(model, heads, name, 512, ids)
    assert torch.allclose(roomy, exact, atol=1e-5)
    tight, stream = feed(model, heads, name, SLOTS, ids)
    assert not torch.allclose(tight, exact, atol=1e-3)
    assert stream.peak == SLOTS if name not in ("paper", "uniform") else stream.peak <= SLOTS
    chunked, again = feed(model, heads, name, SLOTS, ids, chunk=37)
    assert torch.allclose(tight, chunked, atol=1e-4), "events are at fixed positions"
    assert again.peak == stream.peak


@pytest.mark.parametrize("name", ["express", "paper"])
def test_express_is_the_oracle(heads, name):
    policy = Policy.parse(name, SLOTS)
    query, key, value = rows(LENGTH)
    ours = policy.caches(heads, seed=7)[1].attend(query, key, value)
    layout = layout_for(policy.shape())
    for h in range(2):
        oracle = ExpressCache(layout, 16, seed=7, layer=1, kv_head=h)
        group = query[0, 3 * h : 3 * h + 3].transpose(0, 1)
        expected = oracle.extend(group, key[0, h], value[0, h]).transpose(0, 1)
        assert torch.allclose(ours[0, 3 * h : 3 * h + 3].double(), expected.double(), atol=1e-4)


def test_uniform_is_the_oracle_with_coins(heads):
    policy = Policy.parse("uniform", SLOTS)
    query, key, value = rows(LENGTH)
    ours = policy.caches(heads, seed=7)[1].attend(query, key, value)
    layout = layout_for(policy.shape())
    oracle = ExpressCache(layout, 16, seed=7, layer=1, kv_head=1, kernel="uniform")
    expected = oracle.extend(query[0, 3:].transpose(0, 1), key[0, 1], value[0, 1]).transpose(0, 1)
    assert torch.allclose(ours[0, 3:].double(), expected.double(), atol=1e-5)


def test_a_tilt_moves_slots_from_late_layers_to_early_ones(model, heads, ids):
    for name in ("express", "streaming"):
        _, stream = feed(model, heads, f"{name}:tilt=0.25", 192, ids)
        assert [cache.peak for cache in stream.caches] == [240, 144]
        _, stream = feed(model, heads, f"{name}:tilt=0.25,steps=1", 192, ids)
        assert [cache.peak for cache in stream.caches] == [192, 192]


def test_wide_layers_hold_more_at_equal_memory(model, heads, ids, small_config):
    for name in ("express", "streaming"):
        _, stream = feed(model, heads, f"{name}:wide=1,factor=2", 210, ids)
        assert [cache.peak for cache in stream.caches] == [140, 280]
    assert Policy.parse("express:wide=auto", 210).layer_slots(heads) == [210, 210]
    small = dataclasses.replace(heads, layers=30, config=small_config)
    found = Policy.parse("express:wide=auto", 1024).layer_slots(small)
    assert [layer for layer, slots in enumerate(found) if slots == 4 * 787] == [18, 20, 23]
    assert found.count(787) == 27 and sum(found) <= 30 * 1024
    with pytest.raises(ValueError, match="the model's layers are 0 to 1"):
        Policy.parse("express:wide=2", 210).layer_slots(heads)


def test_the_window_is_a_band(heads):
    query, key, value = rows(200)
    cache = WindowCache(heads, 50, 4)
    cache.BLOCK = 16
    ours = torch.cat([cache.attend(*(x[:, :, a:b] for x in (query, key, value)))
                      for a, b in ((0, 70), (70, 71), (71, 200))], 2)  # fmt: skip
    position = torch.arange(200)
    near = position[:, None] - position[None, :] < 46
    seen = (position[:, None] >= position[None, :]) & (near | (position < 4)[None, :])
    assert int(seen.sum(1).max()) == 50
    scores = query.unflatten(1, (2, 3)) @ key[:, :, None].mT / 4
    expected = scores.masked_fill(~seen, -math.inf).softmax(-1) @ value[:, :, None]
    assert torch.allclose(ours, expected.flatten(1, 2), atol=1e-5)


class Recorded:
    """Scores that the test gives: high for some positions, then for low ones."""

    wants_weights = False

    def __init__(self, good):
        self.good = good

    def observe(self, query, weights):
        pass

    def score(self, keys, values, tokens):
        return torch.isin(keys[..., 0], self.good).float() - 1e-3 * keys[..., 0]

    def keep(self, index):
        pass


def test_eviction_keeps_sinks_recent_and_the_best(heads):
    """Against a walk over positions, token by token."""
    query, key, value = rows(90)
    key[..., 0] = torch.arange(90)
    good = torch.arange(10, 90, 7)
    cache = EvictingCache(heads, 32, 8, 2, 6, Recorded(good))
    ours = cache.attend(query, key, value)
    kept, outputs = [], []
    for t in range(90):
        if len(kept) == 32:
            safe = kept[:2] + kept[-6:]
            rest = sorted(kept[2:-6], key=lambda p: (p not in good.tolist(), p))
            kept = sorted(safe + rest[: 24 - 8])
        kept.append(t)
        q = query[0, :, t].unflatten(0, (2, 3))
        w = (q @ key[0][:, kept].mT / 4).softmax(-1)
        outputs.append((w @ value[0][:, kept]).flatten(0, 1))
    assert cache.peak == 32
    assert cache.positions[0, 0, :2].tolist() == [0, 1]
    assert set(good[good < 84].tolist()) <= set(cache.positions[0, 0].tolist())
    assert torch.allclose(ours[0], torch.stack(outputs, 1), atol=1e-4)


def test_shared_and_mixed_choices():
    keys = torch.zeros(1, 2, 6, 16)
    keys[0, :, :, 0] = torch.tensor([[5.0, 0, 4, 0, 0, 3], [0, 0, 4, 5, 0, 0]])
    own = Recorded(torch.tensor([3.0, 4, 5]))
    own.score = lambda keys, values, tokens: keys[..., 0]
    shared = presses.SharedScore(own).score(keys, keys, 6)
    assert shared.topk(1).indices.flatten().tolist() == [2, 2], "the best of the mean, for both"
    other = Recorded(torch.tensor([]))
    other.score = lambda keys, values, tokens: torch.arange(6.0).expand(1, 2, 6)
    mixed = presses.MixedScore(own, other).score(keys, keys, 6)
    best = [set(row) for row in mixed[0].topk(2).indices.tolist()]
    assert best == [{0, 5}, {3, 5}], "the best of either"


def test_balanced_halving_beats_coins_where_keys_are_close_and_peaks_are_within_their_bound():
    rows = bound.measure((256, 512), (3072,), (2,))
    for r in rows[:2]:
        assert 4 * r["n_out"] < r["most"] <= 6 * r["n_out"]
    error = {(r["policy"], r["slots"]): sum(r["errors"]) for r in rows[2:]}
    for name in bound.CACHES:
        assert 0 < error[name, 512] < error[name, 256]
    for slots in (256, 512):
        assert error["lazy, greedy signs", slots] < 0.8 * error["lazy, coins", slots]


def test_accumulated_attention_equals_brute_force(heads):
    query, key, value = rows(60)
    score = Accumulated(heads)
    cache = EvictingCache(heads, 64, 8, 2, 8, score)
    cache.attend(*(x[:, :, :41] for x in (query, key, value)))
    cache.attend(*(x[:, :, 41:] for x in (query, key, value)))
    expected = weights(query, key).sum(-2).mean(2)
    assert torch.allclose(score.mass, expected, atol=1e-4)
    score.keep(torch.tensor([[[3, 5], [0, 59]]]))
    assert torch.allclose(score.mass[0, 1], expected[0, 1, [0, 59]], atol=1e-4)


def test_snapkv_sees_the_weights_of_the_last_rows(heads):
    query, key, value = rows(80)
    press = presses.press_class("snapkv_press", "SnapKVPress")(window_size=16)
    score = presses.SnapScore(heads, press)
    for part in query.split(9, 2):
        score.observe(part, None)
    ours = score.score(key, value, 80)
    rest = weights(query, key)[..., -16:, :-16].mean((2, 3))
    smooth = torch.nn.functional.avg_pool1d(rest, 5, padding=2, stride=1)
    assert torch.allclose(ours[..., :-16], smooth, atol=1e-5)
    assert (ours[..., -16:] > smooth.max()).all()


def test_expected_attention_equals_the_library_on_a_prompt(model, heads):
    """Streamed moments of RoPE-free queries against the press's own, from hidden states."""
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(1, 90, 48, generator=torch.Generator().manual_seed(3))
    press = presses.press_class("expected_attention_press", "ExpectedAttentionPress")()
    module = SimpleNamespace(q_proj=attention.q_proj, config=model.config, head_dim=16,
                             rotary_emb=model.model.rotary_emb)  # fmt: skip
    _, key, value = rows(90)
    expected = press.score(module, hidden, key, value, None, {})
    cos, sin = model.model.rotary_emb(hidden, torch.arange(90)[None])
    query = attention.q_proj(hidden).view(1, 90, 6, 16).transpose(1, 2)
    turned = torch.cat([-query[..., 8:], query[..., :8]], -1)
    query = query * cos[:, None] + turned * sin[:, None]
    score = presses.ExpectedScore(heads, press)
    for part in query.split(13, 2):
        score.observe(part, None)
    assert torch.allclose(score.score(key, value, 90), expected, rtol=1e-3)


def test_forks_do_not_meet(model, heads, ids):
    for name in ("express", "snapkv", "h2o", "exact", "streaming", "uniform"):
        _, stream = feed(model, heads, name, SLOTS, ids[:, :200])
        twin = stream.fork()
        twin.feed(ids[:, 250:])
        first = stream.feed(ids[:, 200:])
        whole, _ = feed(model, heads, name, SLOTS, ids)
        assert torch.allclose(first, whole[:, 200:], atol=1e-4), name


def run_of(model, heads, documents, **options):
    common = {"length": LENGTH, "first": 100, "chunk": 64, "batch": 2, "seeds": [0]}
    return Run(model, heads, None, documents, SimpleNamespace(**common | options), "tiny")


def test_nll_of_exact_is_the_models(model, heads, ids):
    documents = {"a": ids[0].tolist(), "b": ids[1].tolist()}
    found = nll.losses(run_of(model, heads, documents), [Policy.parse("exact", 0)])
    logits = own(model, ids[:, :-1]).double().log_softmax(-1)
    loss = -logits.gather(-1, ids[:, 1:, None])[..., 0]
    assert [row["nll"] for row in found] == pytest.approx(loss[:, 99:].mean(1).tolist(), abs=1e-4)


def test_layer_zero_has_the_same_error_either_way(model, heads, ids):
    """Its inputs are the embeddings, with the cache or without; later layers' are not."""
    run = run_of(model, heads, {"a": ids[0].tolist()}, first=150, slots=[SLOTS],
                 policies=["exact", "express"])  # fmt: skip
    ((row,), _) = error.measure(run)
    assert row["exact"][0] == pytest.approx(row["streaming"][0], abs=1e-5)
    assert row["exact"][0] > 0.01
    assert row["exact"][1] != row["streaming"][1]


def test_needles_and_passages_lie_where_they_say():
    def tokenize(text):
        return [ord(c) for c in text]

    hay = [7] * 5000
    case = recall.needle(tokenize, hay, 2000, 0.25, 1)
    text = "".join(map(chr, case.prompt))
    number = "".join(map(chr, case.candidates[0])).strip()
    assert len(case.prompt) == 2000
    assert text.count(number) == 1
    assert text.index("The magic") == pytest.approx(2000 - case.distance + 2)
    case = recall.pairs(tokenize, hay, 2000, 0.9, 2)
    text = "".join(map(chr, case.prompt))
    assert all(text.count("".join(map(chr, c)).strip()) == 1 for c in case.candidates)
    assert len({c[1] for c in case.candidates}) == 8, "the first digit tells them apart"
    assert text.rindex("The magic number of the", 0, 1950) == 2000 - case.distance + 2
    passages = [[1] * 10, [2] * 10]
    ids, begins = recall.repeated(hay, passages, [500, 300], 1000, True)
    assert len(ids) == 1000 and begins == [980, 990]
    assert ids[480:490] == passages[0] and ids[690:700] == passages[1]
    control, _ = recall.repeated(hay, passages, [500, 300], 1000, False)
    assert control[:980] == [7] * 980 and control[980:] == ids[980:]


def test_answers_are_scored_after_the_prompt(model, heads):
    generator = torch.Generator().manual_seed(5)
    prompt = torch.randint(0, 97, (40,), generator=generator).tolist()
    case = recall.Case(prompt, [[3, 4, 5], [6, 7, 8]], 10)
    stream = Stream(model, Policy.parse("exact", 0).caches(heads))
    (found,) = recall.answer(stream, model, [case], 16)
    scores = []
    for candidate in case.candidates:
        logits = own(model, torch.tensor([prompt + candidate])).log_softmax(-1)[0, 39:42]
        scores.append(float(logits.gather(-1, torch.tensor(candidate)[:, None]).sum()))
    assert found["log_probability"] == pytest.approx(scores[0], abs=1e-3)
    assert found["margin"] == pytest.approx(scores[0] - scores[1], abs=2e-3)


def test_policies_say_what_is_wrong():
    with pytest.raises(ValueError, match="not one of"):
        Policy.parse("snap", 512)
    with pytest.raises(ValueError, match="no option"):
        Policy.parse("express:recent=3", 512)
    assert Policy.parse("express:heavy=0.25", 512).shape().heavy == 128
    assert Policy.parse("uniform:schedule=paper", 512).shape().schedule == "paper"


def test_a_label_says_the_options_as_given_with_shares_in_slots():
    policy = Policy.parse("express:exponent=0,heavy=0.25,profile=even", 512)
    assert policy.label == "express:exponent=0.0,heavy=128,profile=even"
    assert Policy.parse(policy.label, 512) == policy
    assert (
        Policy.parse("keydiff:recent=0.0625,shared=1", 1024).label == "keydiff:recent=64,shared=1"
    )
    assert title("express:wide=auto") == "express (default)"
    assert title("snapkv:wide=auto") == "SnapKV-style, wide layers"


def test_every_method_says_what_it_is():
    for name, method in METHODS.items():
        assert method.__doc__ and method.title and method.name == name


def test_a_layer_that_the_harness_cannot_do_is_refused():
    with pytest.raises(ValueError, match="softcap"):
        harness._attention(SimpleNamespace(layer_idx=0), *rows(3), None, softcap=4.0)


def test_heads_tell_the_group():
    assert Heads(1, 9, 3, 64, 0.125, None, None).group == 3
