"""Cached states in a real engine, float32: a request that starts from one gets the tokens of a cold
run, over 50 random trees of prompts with budgets, chunk sizes, preemptions and aborts mixed."""

from __future__ import annotations

import random

import pytest
import torch
from engines import run_engine

pytestmark = pytest.mark.server
#: The most that the gap of the best two log-probabilities may differ: batches of other sizes round
#: differently, and a GPU multiplies fp32 operands as tf32.
GAP = 5e-2 if torch.cuda.is_available() else 2e-3
TREES = 25
#: Trees whose requests are mixed: their states fit the pool, mostly.
TOGETHER = 2
#: Blocks that make requests wait for one another and be preempted.
POOL = 52


def budgets(model):
    memory = model.size().tokens
    return (
        {"express_memory_tokens": memory(192)}, {"express_memory_tokens": memory(256)},
        {"express_memory_tokens": memory(256), "express_seed": 7}, {"express_mode": "exact"},
    )  # fmt: skip


def random_trees(rng, count, tokens, choices):
    """Nodes of `count` trees, each of which shares a budget and the beginning of a text, and
    batches of nodes whose parents have ended."""
    nodes, levels = [], []
    for number in range(count):
        if number % TOGETHER == 0:
            levels += [[], [], []]
        start, extra = rng.randrange(0, 20000), rng.choice(choices)
        root = len(nodes)
        for level in range(3):
            for _ in range(rng.choice((1, 2, 3) if level else (1, 2))):
                parent = rng.randrange(root, len(nodes)) if level else None
                if level and nodes[parent]["level"] != level - 1:
                    parent = root
                # Siblings share a part of what is new.
                length = rng.randrange(100, 420) if level == 0 else rng.randrange(1, 160)
                at = start + 1000 * level
                other = rng.randrange(0, 20000)
                new = tokens[at : at + length] + tokens[other : other + rng.randrange(1, 40)]
                if rng.random() < 0.2:
                    extra = rng.choice(choices)
                sampled = rng.random() < 0.3
                nodes.append({
                    "level": level, "parent": parent, "kept": rng.randrange(0, 40), "new": new,
                    "max_tokens": rng.randrange(1, 30), "extra_args": extra,
                    "seed": rng.randrange(100) if sampled else None,
                    "temperature": 1.0 if sampled else 0.0,
                    "steps": rng.randrange(1, 12) if rng.random() < 0.1 else 0,
                })  # fmt: skip
                levels[level - 3].append(len(nodes) - 1)
    batches = []
    for level in levels:
        rng.shuffle(level)
        while level:
            size = rng.choice((1, 1, 2, 4, 8))
            batches.append((level[:size], rng.choice((2048, 300, 77))))
            del level[:size]
    return nodes, batches


#: Wide layers by default in test_cached_states.py alone: an engine takes half a minute.
LAYERS = ["equal layers", pytest.param("wide layers", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=LAYERS)
def runs(request, tokens, quick, tmp_path_factory):
    wide = quick.wide if request.param == "wide layers" else {"wide_layers": []}
    nodes, batches = random_trees(random.Random(1), TREES, tokens, budgets(quick))
    # An aborted answer's length depends on the steps; nothing may follow from it.
    for node in nodes:
        if node["parent"] is not None and nodes[node["parent"]]["steps"]:
            node["kept"] = 0
    settings = {"max_memory_tokens": 1536, "memory_tokens": 512, **wide}
    engine = {
        "model": str(quick.path), "additional_config": {"express": settings},
        "num_gpu_blocks_override": POOL, "max_num_seqs": 8,
    }  # fmt: skip
    results = []
    for cached in (True, False):
        call = {"nodes": nodes, "batches": batches, "least_gain": 64}
        more = ["copied_state", {"prompt": tokens[:700], "extra_args": budgets(quick)[0]}]
        calls = [["conversations", call], more]
        result, *copied = run_engine(
            tmp_path_factory.mktemp("states"), "express", calls if cached else calls[:1],
            enable_prefix_caching=cached, **engine,
        )  # fmt: skip
        results.append(result | {"copied": copied})
    return nodes, *results


def test_hits_give_the_tokens_of_a_cold_run(runs):
    nodes, warm, cold = runs
    found = sum(node["cached"] > 0 for node in warm["nodes"])
    cached = sum(node["cached"] for node in warm["nodes"])
    prompts = sum(len(node["prompt"]) for node in warm["nodes"])
    print(
        f"{len(nodes)} requests, {found} started from cached states: {cached} of {prompts} "
        f"tokens; {warm['preemptions']} preemptions"
    )
    assert found > len(nodes) / 4
    assert not any(node["cached"] for node in cold["nodes"])
    for i, (hit, miss) in enumerate(zip(warm["nodes"], cold["nodes"], strict=True)):
        length = min(len(hit["tokens"]), len(miss["tokens"])) if nodes[i]["steps"] else None
        assert hit["prompt"] == miss["prompt"], i
        assert hit["tokens"][:length] == miss["tokens"][:length], (i, hit["cached"])
        assert hit["margins"][:length] == pytest.approx(miss["margins"][:length], abs=GAP), i


def test_nothing_is_lost(runs):
    _, warm, _ = runs
    assert warm["free"] == POOL - 1
    assert warm["usable"]
    assert warm["budgets_left"] == 0
    assert 0 < warm["states"] < POOL


def test_a_hit_has_the_bits_of_the_state(runs):
    """All but the slots of the tokens that have been added since, and of their query."""
    (copied,) = runs[1]["copied"]
    assert copied["cached"] == 700
    assert all(0 < count <= 4 for count in copied["differing"])
