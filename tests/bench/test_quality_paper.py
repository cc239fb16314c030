"""The paper's experiments: what would make their comparisons unfair fails here."""

from __future__ import annotations

import math
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from interpreted import assert_same
from tiny_models import tiny_llama

from bench.quality import harness, plots, presses
from bench.quality.caches import ExactCache
from bench.quality.paper import (
    compress,
    figures,
    hyper,
    kernels,
    latency,
    prefill,
    questions,
    size,
    tables,
)
from bench.quality.paper.common import last_replaced, times
from bench.quality.paper.hyper import Hyper
from bench.quality.policies import Policy
from bench.quality.progress import Progress
from bench.quality.run import Run


def rows(length, count, seed=0, heads=4, kv=2, size=16):
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(1, heads, length, size, generator=generator)
    key, value = torch.randn(2, 1, kv, count, size, generator=generator)
    return query, key, value


def exact(query, key, value, is_causal):
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = query @ key.mT / 4
    if is_causal:
        first = key.shape[2] - query.shape[2]
        scores = scores.masked_fill(torch.ones_like(scores).triu(first + 1).bool(), -math.inf)
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("block", [7, 16, 400])
def test_hyper_attention_that_samples_every_column_is_exact(block, is_causal):
    batch = rows(101, 235)
    ours = hyper.attention(*batch, 0.25, Hyper(block, 235, 20), is_causal=is_causal)
    assert torch.allclose(ours, exact(*batch, is_causal), atol=1e-5)


def test_hyper_attention_estimates_better_with_more():
    batch = rows(300, 300)
    truth = exact(*batch, True)
    errors = [
        sum(float((hyper.attention(*batch, 0.25, Hyper(n, n, 32), seed=seed) - truth).norm())
            for seed in range(4))
        for n in (8, 32, 120)
    ]  # fmt: skip
    assert errors[0] > 1.2 * errors[1] > 1.4 * errors[2] > 0


def test_a_hash_puts_equal_rows_together_and_opposite_rows_apart():
    generator = torch.Generator().manual_seed(0)
    x, planes = torch.randn(50, 16, generator=generator), torch.randn(16, 7, generator=generator)
    assert torch.equal(hyper.buckets(x, planes), hyper.buckets(2 * x, planes))
    assert not (hyper.buckets(x, planes) == hyper.buckets(-x, planes)).any()
    codes = torch.tensor([[float(b) for b in f"{i ^ i >> 1:07b}"] for i in range(128)]) - 0.5
    assert hyper.buckets(codes, torch.eye(7)).tolist() == list(range(128)), "Gray-code order"


@pytest.fixture(scope="module")
def run():
    """A tiny random model of four layers with two documents."""
    model = tiny_llama(4)
    generator = torch.Generator().manual_seed(1)
    documents = {name: torch.randint(0, 97, (420,), generator=generator).tolist() for name in "ab"}
    options = SimpleNamespace(
        length=400, slots=[128], seeds=[0], chunk=400, batch=2, continuation=20, first=64,
        policies=["express", "streaming"], requests=None, data=None, answer=6, questions=9,
    )  # fmt: skip
    return Run(model, harness.heads_of(model), Tokenizer(), documents, options, "tiny")


class Tokenizer:
    """A token is a number; the text of one is `<number> `."""

    eos_token_id = 96

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(c) % 96 for c in text]}

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


def nll_of_the_model(model, ids, first):
    """By transformers' own attention."""
    model.set_attn_implementation("sdpa")
    try:
        logs = model(ids[:, :-1]).logits[:, first - 1 :].log_softmax(-1)
    finally:
        model.set_attn_implementation(harness.ATTENTION)
    return -logs.gather(-1, ids[:, first:, None])[..., 0].mean(1)


@pytest.mark.parametrize("method", prefill.METHODS)
def test_no_replaced_layer_is_the_exact_model_and_a_replaced_one_is_not(run, method):
    ((_, ids),) = run.batches(400)
    exact = nll_of_the_model(run.model, ids, 128)
    lost = []
    for count in (0, 1, 4):
        found = torch.tensor(prefill.nll(run, method, 128, count, 0, ids))
        lost.append(float((found - exact).abs().max()))
    assert lost[0] < 1e-5 < min(lost[1:])


def test_the_perplexity_rows_cover_every_share_once(run):
    rows = prefill.perplexity(run)
    keys = [(r["method"], r["layers"], r["document"]) for r in rows]
    assert len(keys) == len(set(keys)) == 2 * (1 + 3 * 3)
    assert prefill.shares(30) == [0, 7, 15, 30] and prefill.shares(2) == [0, 1, 2]


def test_only_the_last_layers_are_replaced(run):
    caches = prefill.method_caches(run, "hyper", 128, 3)
    mixed = last_replaced(run.heads, caches, 1)
    assert [type(c) for c in mixed] == [ExactCache] * 3 + [hyper.HyperCache]
    assert mixed[3] is caches[3], "layer 3's own seed"


@pytest.mark.parametrize("slots, layers, window, most", [(1024, 32, 64, 8192), (300, 30, 64, 900),
                                                         (257, 7, 32, 300)])  # fmt: skip
def test_pyramids_budgets_fall_linearly_and_sum_to_the_total(slots, layers, window, most):
    found = compress.pyramid(slots, layers, window, most)
    assert sum(found) == slots * layers and len(found) == layers
    steps = [a - b for a, b in pairwise(found)]
    assert min(steps) > 0 and max(steps) - min(steps) <= 2, "linear, but for rounding"
    assert found[0] <= most and found[-1] > window


def test_pyramids_budgets_are_the_librarys():
    """Where the library does not fall back to equal budgets."""
    press = presses.press_class("pyramidkv_press", "PyramidKVPress")(0.75, window_size=64)
    layers = [SimpleNamespace(config=SimpleNamespace(num_hidden_layers=8), layer_idx=i)
              for i in range(8)]  # fmt: skip
    theirs = [press.get_layer_budget(layer, 8192) for layer in layers]
    ours = compress.pyramid(2048, 8, 64, 8192)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1


def test_pyramid_refuses_what_has_no_room():
    with pytest.raises(ValueError, match="window of 64"):
        compress.pyramid(60, 4, 64, 500)


def test_every_method_ends_with_equal_slots(run):
    rows = compress.continuations(run)
    nothing = [r for r in rows if r["method"] == "full"]
    assert {r["used"] for r in nothing} == {419}
    bounded = [r for r in rows if r["method"] != "full"]
    # The last token of the continuation is scored, not stored.
    assert {r["used"] for r in bounded if r["method"] != "itself"} == {127}
    assert {r["used"] for r in bounded if r["method"] == "itself"} == {128}
    assert len(rows) == 2 * (4 + 5)


def test_nothing_removed_after_an_exact_prefill_is_the_exact_model(run):
    rows = compress.continuations(run)
    ((names, ids),) = run.batches(420)
    exact = nll_of_the_model(run.model, ids, 400)
    for name, value in zip(names, exact, strict=True):
        found = {(r["prefill"], r["method"]): r["nll"] for r in rows if r["document"] == name}
        assert found["exact", "full"] == pytest.approx(float(value), abs=2e-5)
        assert len({v for k, v in found.items() if k != ("exact", "full")}) > 6, "all differ"


def test_express_alone_is_the_streaming_cache(run):
    ((_, ids),) = run.batches(420)
    stream = harness.Stream(run.model, Policy.parse("express", 128).caches(run.heads))
    hidden = stream.feed(ids[:, :-1], 400)[:, 399:]
    found, _ = harness.log_probabilities(run.model, hidden, ids[:, 400:])
    rows = [r["nll"] for r in compress.continuations(run) if r["method"] == "itself"]
    assert rows == pytest.approx((-found.mean(1)).tolist(), abs=1e-4)


def test_streaming_keeps_sinks_and_the_latest_and_snapkv_its_window(run):
    cache = compress.OnceCache(run.heads, 0, ExactCache(run.heads), 16)
    cache.attend(*rows(200, 200, heads=6))
    assert cache._kept("streaming", 50)[0, 1].tolist() == [*range(4), *range(154, 200)]
    assert set(range(184, 200)) <= set(cache._kept("snapkv", 50)[0, 0].tolist())


def test_budgets_are_shares_of_the_length_where_a_cache_fits(run):
    options = SimpleNamespace(**{**vars(run.options), "slots": None})
    one = Run(run.model, run.heads, None, {}, options, "")
    assert size.budgets(one, 1200) == [150, 300, 600]
    assert size.budgets(one, 768) == [192, 384]


def test_no_policy_holds_more_than_its_budget(run):
    found = size.accuracy(run, [128])
    assert {r["policy"] for r in found} == {"exact", "express", "streaming"}
    assert all(r["peak"] <= 128 for r in found if r["policy"] != "exact")


def test_greedy_answers_are_the_models(run, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(
        '{"question": "one?", "answer": "#### 1"}\n\n{"question": "b", "answer": "c"}\n'
    )
    ids = questions.prompt(run, "one?")
    stream = harness.Stream(run.model, Policy.parse("exact", 0).caches(run.heads))
    given = questions.greedy(stream, ids, 6, [96])
    tokens = list(ids)
    for expected in given:
        run.model.set_attn_implementation("sdpa")
        assert int(run.model(torch.tensor([tokens])).logits[0, -1].argmax()) == expected
        run.model.set_attn_implementation(harness.ATTENTION)
        tokens.append(expected)
    options = SimpleNamespace(**{**vars(run.options), "data": path, "length": 200})
    rows, _ = size.measure(Run(run.model, run.heads, Tokenizer(), run.documents, options, ""))
    asked = [(r["question"], r["policy"]) for r in rows if r["what"] == "answers"]
    assert asked == [(i, p) for i in (0, 1) for p in ("exact", "express", "streaming")]


def test_an_answer_is_right_by_its_last_number_or_line():
    assert questions.right("so 3 * 4 = 12.\nThe answer is $1,200.", "reasons\n#### 1200")
    assert not questions.right("12 and then 13", "#### 12")
    assert questions.right("Let me think.\n**Paris.**", "paris")
    assert not questions.right("", "paris")


@pytest.mark.parametrize("name", ["exact", "express", "paper", "streaming"])
def test_the_timed_step_attends_to_what_the_policy_holds(run, name):
    segments = latency.held(Policy.parse(name, 128), 400)
    step = latency.Step(run.heads, segments, 2, run.model)
    weights = sum(s.length * s.weight for s in segments)
    assert step.live <= 128 or name == "exact"
    assert weights == (128 if name == "streaming" else 400 if name == "exact" else weights)
    logw = torch.cat([torch.full((s.length,), math.log(2) * s.log2_weight) for s in segments])
    output = step.run()
    dense = step.pages.unflatten(0, (2, step.blocks)).transpose(1, 2).flatten(2, 3)
    key, value = (x.repeat_interleave(3, 1) for x in dense[:, :, : step.live].split(16, -1))
    scores = torch.einsum("bhd,bhsd->bhs", step.query, key) / 4 + logw
    truth = torch.einsum("bhs,bhsd->bhd", scores.softmax(-1), value)
    assert torch.allclose(output, truth, atol=1e-4)
    if name in ("exact", "streaming"):
        assert torch.allclose(step.torch(), output, atol=1e-4)


def test_weights_as_columns_are_weights():
    query, key, value = (x[0] for x in rows(33, 90))
    logw = torch.linspace(0, 7, 90)
    ours = kernels.weighted(query.transpose(0, 1), key, value, logw, 0.25)
    keys, values = (x.repeat_interleave(2, 0) for x in (key, value))
    truth = (query @ keys.mT / 4 + logw).softmax(-1) @ values
    assert torch.allclose(ours, truth, atol=1e-4)


def test_a_clock_keeps_to_its_time():
    found = times(lambda: time.sleep(0.02), torch.device("cpu"), repeats=50, seconds=0.1)
    assert 2 <= len(found) <= 6 and min(found) >= 20


HEAD = {
    "command": "python -m bench.quality.paper", "date": "2026-01-01", "hardware": "test",
    "versions": {"torch": "1"}, "model": "tiny", "dtype": "float32", "seconds": 1, "stopped": [],
    "length": 400, "first": 64, "documents": ["a", "b"], "small": True, "requests": 1,
    "continuation": 20, "slots": [128],
}  # fmt: skip


def test_tables_and_plots_come_from_the_rows(run, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    timed = [{"what": "time", "method": m, "causal": c, "tokens": n, "slots": 128, "ms": [t, t]}
             for m, t in (("FA2", 8.0), ("express", 2.0)) for c in (True, False)
             for n in (8192, 32768)]  # fmt: skip
    durations = latency.durations(run, size.policies(run, [128]), 1)
    nll = size.accuracy(run, [128])
    asked = [{"what": "answers", "policy": "exact", "slots": 0, "question": i, "right": i < 1}
             for i in range(2)]  # fmt: skip
    stored = {
        name: HEAD | {"rows": rows}
        for name, rows in {
            "prefill": prefill.perplexity(run) + timed, "compress": compress.continuations(run),
            "size": nll + asked, "time": nll + durations,
        }.items()
    }  # fmt: skip
    times = "| Express (equal layers) | causal | 2.00 ± 0.00 (4.0) | 2.00 ± 0.00 (4.0) |"
    assert times in tables.prefill_times(stored["prefill"])
    assert "| Express (equal layers) | 128 |" in tables.replaced(stored["prefill"])
    assert "| exact | 0.50 ± 0.50 |" in tables.answers(stored["size"])
    assert "| express | 0." in tables.sizes(stored["size"]).replace(", equal layers", "")
    assert "| express | Express alone | 128 | 128 |" in tables.compressed(stored["compress"])
    assert "| exact, torch SDPA | all | 400 |" in tables.times(stored["time"])
    for result, draw in (
        ("prefill", figures.replaced), ("prefill", figures.causal_times),
        ("compress", figures.compressed), ("size", figures.sizes), ("time", figures.times),
    ):  # fmt: skip
        draw(draw.__name__, stored[result])
        assert (tmp_path / f"{draw.__name__}.png").stat().st_size > 5000


def test_a_run_that_stops_keeps_what_is_complete(run, monkeypatch):
    monkeypatch.setattr(Progress, "deadline", time.monotonic() - 1)
    monkeypatch.setattr(Progress, "stopped", [])
    assert size.accuracy(run, [128]) == []
    assert prefill.perplexity(run) == []
    assert Progress.stopped == ["nll", "perplexity"]


ON_TRITON = """
import torch
from types import SimpleNamespace
from bench import kernels as bench
from bench.quality.harness import Heads
from bench.quality.paper import kernels, latency
from bench.quality.policies import Policy
from express_vllm.layout import layout_for
from express_vllm.reference.attention import log_weights
from express_vllm.reference.cache import ExpressCache
from express_vllm.softmax import Softmax

bench.HEADS, bench.KV_HEADS, bench.SIZE, bench.GROUP, bench.SCALE = 4, 2, 64, 2, 0.125
bench.SOFTMAX = Softmax(bench.SCALE)
bench.DEVICE, bench.DTYPE = torch.device("cpu"), torch.float32
torch.cuda.Stream = lambda priority: None
torch.manual_seed(0)
batch = bench.random_tokens(170)
policy = Policy.parse("express", 128)
last = kernels.express(batch, 128, masked=False)()[:, -1]
for h in range(2):
    oracle = ExpressCache(layout_for(policy.shape()), 64, seed=7, layer=0, kv_head=h)
    truth = oracle.extend(batch[0][:, 2 * h : 2 * h + 2], batch[1][:, h], batch[2][:, h])[-1]
    assert torch.allclose(last[2 * h : 2 * h + 2], truth.float(), atol=1e-3), h

heads = Heads(1, 4, 2, 64, 0.125, None, None)
model = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
latency.Step._cpu = latency.Step._gpu
for name in ("express", "streaming"):
    segments = latency.held(Policy.parse(name, 128), 400)
    step = latency.Step(heads, segments, 2, model)
    logw = log_weights(segments, torch.float32)
    dense = step.pages.unflatten(0, (2, step.blocks)).transpose(1, 2).flatten(2, 3)
    key, value = (x.repeat_interleave(2, 1) for x in dense[:, :, : step.live].split(64, -1))
    scores = torch.einsum("bhd,bhsd->bhs", step.query, key) / 8 + logw
    truth = torch.einsum("bhs,bhsd->bhd", scores.softmax(-1), value)
    assert torch.allclose(step.run(), truth, atol=1e-4), name
print("same")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU compiles the kernels")
def test_what_a_gpu_runs_is_right_in_tritons_interpreter():
    """The last query, without a mask, sees what the causal one sees: the coreset and the window."""
    assert_same(ON_TRITON)
