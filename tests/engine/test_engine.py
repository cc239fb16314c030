"""A real engine in float32: budgets, exactness, determinism, no leaks.

With a random model here, with the small one in test_real_engine.py and on GPUs.
"""

from __future__ import annotations

import math

import pytest
import torch
from budgets import resolve
from engines import BLOCK, OWN, SUPPORT, request, run_engine, same_tokens

from express_vllm.config import ServerConfig
from express_vllm.server.usage import Sequence, usage

pytestmark = pytest.mark.server
GROWING = 9
SEEDS = ({"seed": 5}, {"seed": 6}, {})
#: A pool that makes vLLM's own backend preempt.
OWN_POOL = 49
#: Log-probability gap of two tokens below which it may take the other one: TRITON_ATTN multiplies
#: fp32 operands as tf32.
OWN_TIE = 0.05 if torch.cuda.is_available() else 0.0


@pytest.fixture(scope="module")
def prompts(tokens):
    """22 short prompts from different places of the text."""
    return [tokens[start : start + 24 + 4 * i] for i, start in enumerate(range(0, 22000, 1000))]


@pytest.fixture(scope="module")
def model(quick):
    return quick


@pytest.fixture(scope="module")
def workload(tokens, prompts, model):
    def memory(slots):
        """For so many slots in an ordinary layer."""
        return model.size().tokens(slots)

    seeded = request(tokens[500:1400], 32, memory_tokens=memory(512), seed=11)
    pinned = request(tokens[500:1400], 32, memory_tokens=memory(512), pinned_tokens=300)
    others = [
        request(
            tokens[i * 300 : i * 300 + 100 + 60 * i], 24 + i, memory_tokens=memory(192 + 32 * i)
        )
        for i in range(8)
    ]
    sampled = [request(tokens[i * 500 : i * 500 + 600], 12) for i in range(3)]
    growing = [
        request(tokens[i * 700 : i * 700 + 100], 100, memory_tokens=memory(192))
        for i in range(GROWING)
    ]
    aborted = [
        request(tokens[i * 100 : i * 100 + 400], 64, memory_tokens=memory(256)) for i in range(50)
    ]
    turn = {"max_tokens": 12, "seed": None, "temperature": 0.0, "steps": 0, "kept": 12,
            "extra_args": {"express_memory_tokens": memory(256)}}  # fmt: skip
    turns = [
        {**turn, "parent": None, "new": tokens[3000:3700]},
        {**turn, "parent": 0, "new": tokens[9000:9100]},
    ]
    return {
        "chat": {"nodes": turns, "batches": [([0], 2048), ([1], 2048)]},
        "short": [request(p, 24) for p in prompts],
        "short_fits": [request(p, 24, memory_tokens=memory(512)) for p in prompts],
        "short_exact": [request(p, 24, mode="exact") for p in prompts],
        "seeded": seeded,
        "mixed": [seeded, *others, pinned],
        "pinned": pinned,
        # The last one has no seed of its own.
        "sampled": [
            {**r, "temperature": 1.0} | seed for r, seed in zip(sampled, SEEDS, strict=True)
        ],
        "growing": growing,
        "aborted": aborted,
    }


def engine(model):
    settings = {"max_memory_tokens": 1024, "memory_tokens": 512, **model.wide}
    return {"model": str(model.path), "additional_config": {"express": settings}}


@pytest.fixture(scope="module")
def express(tmp_path_factory, workload, model):
    """Every express job, on one engine."""
    w = workload
    calls = {
        "fits": ("generate", {"requests": w["short_fits"]}),
        "exact": ("generate", {"requests": w["short_exact"]}),
        "alone": ("generate", {"requests": [w["seeded"]]}),
        "again": ("generate", {"requests": [w["seeded"]]}),
        "batch": ("generate", {"requests": w["mixed"]}),
        "pinned": ("generate", {"requests": [w["pinned"]]}),
        "chunks": ("generate", {"requests": [w["seeded"]], "max_batched_tokens": 256}),
        "pinned_chunks": ("generate", {"requests": [w["pinned"]], "max_batched_tokens": 256}),
        "sampled": ("generate", {"requests": w["sampled"], "max_batched_tokens": 2048}),
        "sampled_chunks": ("generate", {"requests": w["sampled"], "max_batched_tokens": 256}),
        # 400-token prompts in chunks of 256: step 1 is mid-prefill, the others mid-decode.
        "aborts": ("aborts", {"requests": w["aborted"], "steps": [1, 2, 3, 4, 6] * 10}),
        "chat": ("conversations", w["chat"]),
        "preempted": ("generate", {"requests": w["growing"], "max_batched_tokens": 2048}),
        "unpreempted": ("alone", {"requests": w["growing"]}),
    }
    folder = tmp_path_factory.mktemp("express")
    results = run_engine(folder, "express", list(calls.values()), **engine(model))
    return dict(zip(calls, results, strict=True))


@pytest.fixture(scope="module")
def own(tmp_path_factory, workload, model):
    """The same jobs with vLLM's own backend, which knows no budgets."""

    def plain(requests):
        return [{**r, "extra_args": None} for r in requests]

    calls = {
        "short": ("generate", {"requests": workload["short"]}),
        "alone": ("generate", {"requests": plain([workload["seeded"]])}),
        "batch": ("generate", {"requests": plain(workload["mixed"])}),
        "pinned": ("generate", {"requests": plain([workload["pinned"]])}),
        "chunks": (
            "generate",
            {"requests": plain([workload["seeded"]]), "max_batched_tokens": 256},
        ),
        "preempted": (
            "generate",
            {"requests": plain(workload["growing"]), "max_batched_tokens": 2048},
        ),
        "unpreempted": ("alone", {"requests": plain(workload["growing"])}),
    }
    folder = tmp_path_factory.mktemp("own")
    results = run_engine(
        folder, OWN, list(calls.values()), num_gpu_blocks_override=OWN_POOL,
        max_model_len=(OWN_POOL - 1) * BLOCK, model=str(model.path),
    )  # fmt: skip
    return dict(zip(calls, results, strict=True))


def test_a_request_holds_at_most_its_budget(express):
    for job in ("alone", "pinned"):
        assert express[job]["peak_blocks"] == math.ceil(512 / BLOCK)
    assert express["preempted"]["peak_blocks"] == math.ceil(192 / BLOCK)


@pytest.mark.parametrize("job", ["alone", "batch", "chunks", "exact"])
def test_usage_is_the_engines_own_accounting(express, workload, model, job):
    """`usage.express` needs only lengths; the blocks that the engine gave out say the same."""
    requests = {"batch": workload["mixed"], "exact": workload["short_exact"]}
    config = ServerConfig(memory_tokens=512, max_memory_tokens=1024)
    size = model.size()
    ran = zip(
        requests.get(job, [workload["seeded"]]), express[job]["tokens"], express[job]["peaks"],
        strict=True,
    )  # fmt: skip
    for sent, tokens, blocks in ran:
        prompt = len(sent["prompt"])
        budget = resolve(
            sent["extra_args"], config, prompt_tokens=prompt, max_tokens=sent["max_tokens"],
            max_model_len=8192, size=size,
        )  # fmt: skip
        found = usage([Sequence(budget, prompt, len(tokens))], size)
        assert math.ceil(size.slots(found["peak_kv_tokens"]) / BLOCK) == blocks


def test_a_fitting_budget_is_exact_mode_to_the_byte(express):
    assert express["fits"]["texts"] == express["exact"]["texts"]
    assert express["fits"]["tokens"] == express["exact"]["tokens"]


def test_a_fitting_budget_gives_the_text_of_vllms_own_backend(express, own):
    assert len(own["short"]["texts"]) >= 20
    same = [a == b for a, b in zip(express["fits"]["texts"], own["short"]["texts"], strict=True)]
    print(f"{sum(same)} of {len(same)} texts are those of {OWN}")
    for i in (i for i, equal in enumerate(same) if not equal):
        ours, theirs = express["fits"]["tokens"][i], own["short"]["tokens"][i]
        first = next(j for j, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        print(f"text {i} leaves at {first}, where the gap was {own['short']['margins'][i][first]}")
        assert own["short"]["margins"][i][first] < OWN_TIE


def test_the_same_request_gives_the_same_tokens_again(express):
    assert express["alone"]["tokens"] == express["again"]["tokens"]


@pytest.mark.parametrize("change", ["batch", "chunks"])
def test_batch_and_chunk_do_not_change_a_request(express, own, change):
    """Where vLLM's own backend keeps its tokens under the same change, so do we."""
    ours = express["alone"]["tokens"][0] == express[change]["tokens"][0]
    theirs = own["alone"]["tokens"][0] == own[change]["tokens"][0]
    assert ours or not theirs


def test_batch_and_chunk_do_not_change_a_request_that_pins_tokens(express, own):
    alone = express["pinned"]["tokens"][0]
    theirs = own["pinned"]["tokens"][0] == own["batch"]["tokens"][-1]
    assert alone == express["batch"]["tokens"][-1] or not theirs
    assert alone == express["pinned_chunks"]["tokens"][0] or not theirs
    assert alone != express["alone"]["tokens"][0], "the pin changes what is kept"


def test_a_seed_samples_the_same_tokens_whatever_the_chunks(express):
    """On CPUs vLLM's own way ends the engine: «CPU Generator does not use offset»."""
    whole, chunks = express["sampled"]["tokens"], express["sampled_chunks"]["tokens"]
    assert whole[:2] == chunks[:2]
    assert whole[0] != whole[1] and len(set(whole[0])) > 1


def test_preemption_does_not_change_a_request(express, own):
    assert express["preempted"]["preemptions"] > 0, "the pool is small enough to preempt"
    ours = same_tokens(express["preempted"], express["unpreempted"])
    theirs = same_tokens(own["preempted"], own["unpreempted"])
    print(f"unchanged of {GROWING}: express {ours}, {OWN} {theirs}")
    assert ours >= theirs


def test_no_request_leaks_a_block(express):
    for name in ("fits", "alone", "batch", "pinned", "chunks", "preempted"):
        assert express[name]["leaked"] == 0
        assert express[name]["budgets_left"] == 0


def test_aborts_return_every_block(express):
    aborts = express["aborts"]
    assert aborts["after"] == aborts["before"]
    assert aborts["budgets_left"] == 0
    assert max(aborts["held"]) == math.ceil(256 / BLOCK) and min(aborts["held"]) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo ranks share a CPU")
def test_tensor_parallel_ranks_give_the_tokens_of_one(tmp_path, express, workload, model):
    """A KV head each.  They cache prefixes and one rank does not: each rank copies its own part."""
    calls = [
        ("generate", {"requests": [workload["seeded"]]}),
        ("generate", {"requests": workload["short_fits"][:8]}),
        ("conversations", workload["chat"]),
    ]
    alone, short, chat = run_engine(
        tmp_path, "express", calls, tensor_parallel_size=model.kv_heads, enable_prefix_caching=True,
        worker_cls="gloo_worker.GlooWorker", **engine(model),
        environment={
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(SUPPORT),
        },
    )  # fmt: skip
    assert alone["tokens"] == express["alone"]["tokens"]
    assert short["tokens"] == express["fits"]["tokens"][:8]
    assert [turn["cached"] for turn in chat["nodes"]] == [0, 711]
    cold = [turn["tokens"] for turn in express["chat"]["nodes"]]
    assert [turn["tokens"] for turn in chat["nodes"]] == cold
