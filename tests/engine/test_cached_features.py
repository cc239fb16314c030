"""Cached states beside other features, in a real engine in float32: pins, several sequences of one
prompt, vLLM's reset, and adapters.

That hits give the tokens of cold runs is in test_states.py; ranks are in test_tensor_parallel.py.
"""

from __future__ import annotations

import pytest
import torch
from adapters import RANK, write_adapter
from engines import run_engine
from transformers import AutoConfig

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(torch.cuda.is_available(), reason="it counts synchronous steps"),
]
STEP = 2048
PROMPT, ANSWER, NEW = 900, 8, 200
PINNED = 304
SEEDS = (5, 6, 7)


def node(new, parent=None, **more):
    """One turn: what is new in it, after all of the parent's."""
    return {
        "parent": parent, "kept": ANSWER, "new": new, "max_tokens": ANSWER, "seed": None,
        "temperature": 0.0, "steps": 0, **more,
    }  # fmt: skip


def one_by_one(nodes, **more):
    batches = [([i], STEP) for i in range(len(nodes))]
    return ("conversations", {"nodes": nodes, "batches": batches, **more})


def run(folder, quick, calls, **more):
    settings = {"max_memory_tokens": 2048, "memory_tokens": 512, **quick.wide}
    results = run_engine(
        folder, "express", list(calls.values()), model=str(quick.path), enable_prefix_caching=True,
        additional_config={"express": settings}, num_gpu_blocks_override=240, **more,
    )  # fmt: skip
    return dict(zip(calls, results, strict=True))


@pytest.fixture(scope="module")
def bounded(quick):
    return {"express_memory_tokens": quick.size().tokens(512)}


@pytest.fixture(scope="module")
def found(quick, tokens, bounded, tmp_path_factory):
    pinned = bounded | {"express_pinned_tokens": PINNED}
    prompt, more = tokens[500 : 500 + PROMPT], tokens[5000 : 5000 + NEW]
    # The second text begins with the first: a state of the first would serve it.
    pins = [node(prompt, extra_args=bounded), node(prompt + more[:40], extra_args=pinned),
            node(more, 1, extra_args=pinned)]  # fmt: skip
    long = tokens[9000 : 9000 + PROMPT]
    sampled = {"temperature": 1.0, "max_tokens": ANSWER, "extra_args": bounded}
    sequences = [node(long, extra_args=bounded, seed=s, temperature=1.0) for s in SEEDS]
    text = tokens[15000 : 15000 + PROMPT + 400]
    slots = {"prompt": text, "first": pinned, "second": {"express_mode": "exact"}}
    calls = {
        "pins": one_by_one(pins), "reset": ("reset", {}),
        "pins, cold": one_by_one(pins, cold=True),
        "first turn": one_by_one([node(text[:PROMPT], extra_args=pinned)]),
        "slots": ("first_slots", slots | {"count": PINNED, "kv_heads": quick.kv_heads}),
        "sequences, cold": one_by_one(sequences, cold=True),
        "reset again": ("reset", {}),
        "sequences": ("samples", {"prompt": long, "n": 3, "seed": SEEDS[0], **sampled}),
    }  # fmt: skip
    return run(tmp_path_factory.mktemp("features"), quick, calls)


def part(result, name):
    return [turn[name] for turn in result["nodes"]]


def test_a_reset_empties_states(found):
    for name in ("reset", "reset again"):
        assert found[name]["done"] and min(found[name]["before"]) > 0
        assert found[name]["after"] == [0, 0]


def test_a_second_turn_finds_the_state_of_its_own_pins(found):
    warm, cold = found["pins"], found["pins, cold"]
    assert part(warm, "cached") == [0, 0, PROMPT + 40 + ANSWER - 1]
    assert part(warm, "tokens") == part(cold, "tokens")


def test_pinned_tokens_are_exact_after_a_hit(found):
    """What the cache holds in their slots is what it holds when every token is kept."""
    slots = found["slots"]
    assert slots["cached"] == [PROMPT, 0]
    assert slots["differing"] == [0, 0]
    assert min(slots["others"]) > 50, "the next ones are thinned"


def test_sequences_of_one_prompt_share_its_state(found):
    shared, alone = found["sequences"], found["sequences, cold"]
    whole = PROMPT // 32 * 32
    assert shared["cached"] == [0, whole, whole]
    assert shared["computed"] == PROMPT + 2 * (PROMPT - whole) + 3 * (ANSWER - 1)
    assert shared["tokens"] == part(alone, "tokens")
    assert len({tuple(tokens) for tokens in shared["tokens"]}) == 3


@pytest.mark.slow
def test_a_state_serves_its_own_adapter_only(quick, tokens, bounded, tmp_path):
    config = AutoConfig.from_pretrained(quick.path)
    adapters = [
        write_adapter(tmp_path / name, config, scale=0.3, seed=seed)
        for seed, name in enumerate(("one", "other"))
    ]
    prompt, more = tokens[500 : 500 + PROMPT], tokens[5000 : 5000 + NEW]
    # The second text begins with the first: a state of the first would serve it.
    turns = [
        node(prompt + tokens[:extra], extra_args=bounded, lora=lora)
        for extra, lora in zip((0, 40), adapters, strict=True)
    ]
    turns += [node(more, i, extra_args=bounded, lora=lora) for i, lora in enumerate(adapters)]
    calls = {"warm": one_by_one(turns), "cold": one_by_one(turns, cold=True)}
    lora = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 2}
    warm, cold = run(tmp_path, quick, calls, **lora).values()
    stored = [PROMPT + ANSWER - 1, PROMPT + 40 + ANSWER - 1]
    assert part(warm, "cached") == [0, 0, *stored], "the last token is not stored"
    assert part(cold, "cached") == [0, 0, 0, 0]
    assert part(warm, "tokens") == part(cold, "tokens")
    first, second = part(cold, "tokens")[:2]
    assert first != second, "the adapters differ"
