"""Models some of whose layers are bounded by themselves: express thins the others, vLLM's own
backend runs those."""

from __future__ import annotations

import math

import pytest
import random_families
import realdata
from engines import BLOCK, OWN, engine_config, request, run_engine, same_tokens

from express_vllm import smallmodel
from express_vllm.layers import ModelLayers

pytestmark = pytest.mark.server
SLOTS, GROWING = 192, 7
#: Tokens of a step, which a window holds beside its own while a chunk runs.
MOST, STEP, CHUNK = 512, 256, 100
#: Gaps of log-probabilities below which the order of sums decides.
TIES = {"float32": 1e-3, "bfloat16": 0.1}
#: The pool of vLLM's own backend, which keeps every token.
OWN_POOL = 400
#: Slots of a block where a state does not fit what is asked for.
BLOCKS = {"qwen3_next": 64}
#: The first has two block tables of layers that grow.
FAMILIES = [
    "gemma3",
    *(pytest.param(x, marks=pytest.mark.slow)
      for x in ("exaone4", "cohere2", "llama4", "qwen3_next", "granite4",
                "gemma2", "gpt_oss")),
]  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family, tmp_path_factory):
    path = random_families.write(tmp_path_factory.mktemp(family), family)
    # vLLM's gated delta nets run in bfloat16 alone on CPUs.
    return {"model": str(path), "dtype": "bfloat16" if family == "qwen3_next" else "float32"}


@pytest.fixture(scope="module")
def workload(tokens):
    long = tokens[500:1300]
    return {
        "fits": [request(tokens[i * 900 : i * 900 + 200 + 60 * i], 16) for i in range(4)],
        "alone": [request(long, 24, memory_tokens=SLOTS)],
        "batch": [
            request(long, 24, memory_tokens=SLOTS),
            *(request(tokens[i * 300 : i * 300 + 90 + 90 * i], 12 + i) for i in range(4)),
        ],
        "growing": [
            request(tokens[i * 700 : i * 700 + 120], 32, memory_tokens=SLOTS)
            for i in range(GROWING)
        ],
        "aborted": [request(tokens[i * 100 : i * 100 + 400], 64) for i in range(8)],
    }


def pool(path, family):
    """Blocks for all of the growing requests when they have grown, but for one block: the null
    block is another."""
    size = BLOCKS.get(family, BLOCK)
    layers = ModelLayers.of(engine_config(path).model_config)
    held = math.ceil(152 / size) * layers.groups + layers.bounded_blocks(152, size)
    return GROWING * held


@pytest.fixture(scope="module")
def express(tmp_path_factory, workload, model, family):
    w = workload
    calls = {
        "fits": ("generate", {"requests": w["fits"], "max_batched_tokens": MOST}),
        "alone": ("generate", {"requests": w["alone"], "max_batched_tokens": STEP}),
        "chunks": ("generate", {"requests": w["alone"], "max_batched_tokens": CHUNK}),
        "batch": ("generate", {"requests": w["batch"], "max_batched_tokens": MOST}),
        "aborts": ("aborts", {"requests": w["aborted"], "steps": [1, 2, 3, 5] * 2}),
        "preempted": ("generate", {"requests": w["growing"]}),
        "unpreempted": ("alone", {"requests": w["growing"]}),
    }
    results = run_engine(
        tmp_path_factory.mktemp("express"), "express", list(calls.values()), **model,
        num_gpu_blocks_override=pool(model["model"], family), max_num_batched_tokens=MOST,
        additional_config={"express": {"max_memory_tokens": 512, "memory_tokens": 512}},
    )  # fmt: skip
    return dict(zip(calls, results, strict=True))


@pytest.fixture(scope="module")
def own(tmp_path_factory, workload, model):
    """The same with vLLM's own backend, which knows no budgets."""

    def call(name, tokens):
        requests = [{**r, "extra_args": None} for r in workload[name]]
        return "generate", {"requests": requests, "max_batched_tokens": tokens}

    calls = {
        "fits": call("fits", MOST), "alone": call("alone", STEP), "chunks": call("alone", CHUNK),
        "batch": call("batch", MOST),
    }  # fmt: skip
    results = run_engine(
        tmp_path_factory.mktemp("own"), OWN, list(calls.values()), **model,
        num_gpu_blocks_override=OWN_POOL, max_model_len=2048, max_num_batched_tokens=MOST,
    )  # fmt: skip
    return dict(zip(calls, results, strict=True))


def test_a_fitting_budget_gives_the_tokens_of_vllms_own_backend(express, own, model):
    for ours, theirs, gaps in zip(
        express["fits"]["tokens"], own["fits"]["tokens"], own["fits"]["margins"], strict=True
    ):
        for a, b, gap in zip(ours, theirs, gaps, strict=True):
            if a != b:
                assert gap < TIES[model["dtype"]], (ours, theirs)
                break


def test_a_request_holds_at_most_its_budget_and_its_windows(express, family):
    held = express["alone"]["group_peaks"]
    assert held.pop("ExpressManager") == math.ceil(SLOTS / BLOCKS.get(family, BLOCK))
    window = random_families.WINDOW - 1 + STEP
    assert 0 < max(held.values()) <= math.ceil(window / BLOCK) + 1


@pytest.mark.parametrize("change", ["chunks", "batch"])
def test_batch_and_chunks_do_not_change_a_request(express, own, change):
    """Where vLLM's own backend keeps its tokens: states are summed up in bfloat16."""
    ours = express["alone"]["tokens"][0] == express[change]["tokens"][0]
    theirs = own["alone"]["tokens"][0] == own[change]["tokens"][0]
    assert ours or not theirs


def test_preemption_does_not_change_a_request(express, family, model):
    if family != "llama4":  # a chunk's blocks go all at once
        assert express["preempted"]["preemptions"] > 0, "the pool is small enough to preempt"
    same = same_tokens(express["preempted"], express["unpreempted"])
    # A preempted request computes its answer again as a prompt, and the sums of states differ.
    assert same == GROWING if model["dtype"] == "float32" else same > GROWING // 2


def test_nothing_is_left_behind(express):
    for name in ("fits", "alone", "chunks", "batch", "preempted"):
        assert express[name]["leaked"] == express[name]["budgets_left"] == 0
    aborts = express["aborts"]
    assert aborts["after"] == aborts["before"] and min(aborts["held"]) > 0


@pytest.mark.slow
def test_a_real_model_reads_30_000_tokens_in_1_024_slots(tmp_path):
    """Gemma 3 270M, whose three full layers of eighteen grow."""
    from transformers import AutoTokenizer

    path = smallmodel.ensure(name=smallmodel.GEMMA3.name)
    tokenizer = AutoTokenizer.from_pretrained(path)
    story = tokenizer("Once upon a time there was a")["input_ids"]
    assert story[0] == tokenizer.bos_token_id == 2
    text = tokenizer(realdata.text())["input_ids"]
    long = (text + 2 * text[1:])[:30_000]
    calls = [
        ("generate", {"requests": [request(story, 11)]}),
        ("generate", {"requests": [request(long, 12, memory_tokens=1024)]}),
    ]
    short, found = run_engine(
        tmp_path, "express", calls, model=str(path), max_model_len=32_768, timeout=1800,
        num_gpu_blocks_override=600,
        additional_config={"express": {"max_memory_tokens": 1024, "memory_tokens": 1024}},
    )  # fmt: skip
    assert short["texts"] == [" little girl named Mary. She was a very pretty girl"]
    held = found["group_peaks"]
    assert held.pop("ExpressManager") == 1024 // BLOCK
    assert 0 < held["SlidingWindowManager"] <= math.ceil((511 + 2048) / BLOCK) + 1
    assert found["leaked"] == found["budgets_left"] == 0
    print(found["texts"])
