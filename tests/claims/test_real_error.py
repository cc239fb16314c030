"""Attention error on the small model's own queries, keys and values, at equal peak slots."""

from __future__ import annotations

import numpy as np
import pytest
import realdata
import torch

from express_vllm.backend.batch import Batch
from express_vllm.backend.cpu.metadata import plan_batch
from express_vllm.backend.cpu.path import CpuPath
from express_vllm.budget import Budget
from express_vllm.shape import make_shape
from express_vllm.softmax import Softmax

BLOCK_SIZE = 64
#: Errors are averaged over positions from here on: every budget has long been full.
FIRST = 1536


@pytest.fixture(scope="module")
def layers():
    """Layer -> (queries, keys, values, exact attention outputs)."""
    return {layer: (*rows, exact(*rows)) for layer, rows in realdata.load().items()}


def exact(queries, keys, values, recent=None, sinks=4):
    """Causal attention; with `recent`, only to the sinks and the last `recent` tokens."""
    position = torch.arange(queries.shape[0])
    distance = position[:, None] - position[None, :]
    seen = distance >= 0
    if recent is not None:
        seen &= (distance < recent) | (position[None, :] < sinks)
    rows = (x.transpose(0, 1)[None] for x in (queries, keys, values))
    out = torch.nn.functional.scaled_dot_product_attention(*rows, attn_mask=seen, enable_gqa=True)
    return out[0].transpose(0, 1)


def express(queries, keys, values, shape, layer, kernel=None):
    """The whole sequence through the CPU path with one cache shape."""
    tokens, heads, size = queries.shape
    kv_heads = keys.shape[1]
    path = CpuPath(layer, 0, kv_heads, heads // kv_heads, size, Softmax(size**-0.5), kernel=kernel)
    blocks = -(-shape.slots // BLOCK_SIZE)
    cache = torch.zeros(blocks, kv_heads, BLOCK_SIZE, 2 * size)
    budget = Budget("express", shape.slots, shape.slots, 0, "recent", shape.slots, shape)
    table = np.arange(blocks, dtype=np.int32)[None]
    output = torch.empty_like(queries)
    plan = plan_batch(
        Batch([], [budget], np.array([0, tokens]), np.array([tokens])), table, BLOCK_SIZE
    )
    path.forward(queries, keys, values, cache, plan, output)
    return output


def error(layers, method):
    """Mean relative error of the attention outputs over layers, heads and positions."""
    parts = []
    for layer, (queries, keys, values, truth) in layers.items():
        ours = method(queries, keys, values, layer)
        gap = (ours - truth)[FIRST:].norm(dim=-1) / truth[FIRST:].norm(dim=-1)
        parts.append(float(gap.mean()))
    return float(np.mean(parts))


def ours(layers, shape, kernel=None):
    return error(layers, lambda q, k, v, layer: express(q, k, v, shape, layer, kernel))


def test_error_falls_as_the_budget_grows(layers):
    errors = [ours(layers, make_shape(slots)) for slots in (128, 256, 512, 1024)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 4


@pytest.mark.parametrize("slots", [512, 1024])
def test_default_beats_streaming_uniform_and_paper(layers, slots):
    default = ours(layers, make_shape(slots))
    rivals = {
        "StreamingLLM": error(layers, lambda q, k, v, layer: exact(q, k, v, recent=slots - 4)),
        "uniform, lazy": ours(layers, make_shape(slots, heavy=0), "uniform"),
        "uniform, paper": ours(layers, make_shape(slots, schedule="paper"), "uniform"),
        "paper": ours(layers, make_shape(slots, schedule="paper")),
    }
    print(f"{slots} slots: default {default:.4f}", {k: round(v, 4) for k, v in rivals.items()})
    for name, value in rivals.items():
        assert default < 0.9 * value, name


def test_halving_beats_a_coin_beside_heavy_hitters(layers):
    """What the walk itself adds: the same cache with every pair decided by a coin is worse."""
    shapes = [make_shape(512), make_shape(1024)]
    assert sum(ours(layers, s) for s in shapes) < sum(ours(layers, s, "uniform") for s in shapes)
