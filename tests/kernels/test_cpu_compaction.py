"""The compiled compaction against the oracle: the same decisions, the same slots."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from numba import njit

from express_vllm import rng
from express_vllm.backend.cpu import compaction, decode
from express_vllm.backend.cpu.scalar import RAW, fast_exp, fast_tanh, random_bits, widen
from express_vllm.layout import Layout
from express_vllm.reference.cache import ExpressCache
from express_vllm.shape import RING_ROWS, make_shape
from express_vllm.softmax import Softmax


def state(event, head_size, heads, seed):
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randn(heads, event.live_before + 3, 2 * head_size, generator=generator)
    rows = 2 * torch.randn(heads, RING_ROWS, head_size, generator=generator)
    return slots.numpy(), rows.numpy()


@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize("schedule", ["lazy", "paper"])
@pytest.mark.parametrize("index", [0, 1, 7, 60])
def test_decisions_equal_the_reference(head_size, schedule, index):
    layout = Layout(make_shape(256, schedule=schedule))
    event, shape, heads = layout.event(index), layout.shape, 2
    source, rows = state(event, head_size, heads, index)
    target = np.full_like(source, np.nan)
    segments = layout.segments(event.position)
    bias = np.concatenate(
        [np.full(s.length, np.log(2) * s.log2_weight, np.float32) for s in segments]
    )
    order = compaction.compact(
        source,
        target,
        rows,
        bias,
        (event, shape, compaction.operations(event)),
        seed=2**33 + 5,
        layer=3,
        first_head=4,
        softmax=Softmax(head_size**-0.5),
        kernel="exponential" if schedule == "paper" else "gaussian",
    )
    for head in range(heads):
        oracle = ExpressCache(layout, head_size, seed=2**33 + 5, layer=3, kv_head=4 + head)
        live = torch.from_numpy(source[head, : event.live_before]).double()
        oracle.keys, oracle.values = live[:, :head_size], live[:, head_size:]
        oracle.rows, oracle.tokens = torch.from_numpy(rows[head])[:, None].double(), event.position
        oracle.positions = torch.arange(event.live_before)
        oracle._compact(event)
        assert order[head, : event.live_after].tolist() == oracle.positions.tolist()
        moved = source[head][oracle.positions]
        assert np.array_equal(target[head, : event.live_after], moved)


def test_random_bits_equal_the_oracle():
    for words in [(0, 0, 0, 0), (2**32 - 1, 7, 3, 11), (12345, 1, 2, 2**31)]:
        compiled = int(random_bits(*(np.uint64(w) for w in words)))
        assert compiled == rng.bits(*words)
        assert 0.0 <= rng.uniform(compiled) < 1.0


@njit
def compiled_widen(word):
    return widen(word)


def test_exp_tanh_and_half_precision_loads():
    x = -np.linspace(0, 90, 5001, dtype=np.float32)
    ours = np.array([fast_exp(v) for v in x])
    expected = np.exp(x.astype(np.float64))
    error = np.abs(ours - expected)
    assert np.all(error <= 2e-7 * (1.0 - x) * expected + 1e-37)
    y = np.concatenate([np.linspace(-9, 9, 5001), [-1e30, -1e-8, 0.0, 1e30]]).astype(np.float32)
    tanh = np.array([fast_tanh(v) for v in y])
    assert np.abs(tanh - np.tanh(y.astype(np.float64))).max() < 4e-7
    values = torch.randn(1000) * 10.0 ** torch.randint(-7, 4, (1000,))
    for dtype in (torch.bfloat16, torch.float16):
        stored = values.to(dtype)
        words = stored.view(torch.int16).numpy().view(RAW[dtype])
        wide = np.array([compiled_widen(w) for w in words])
        assert np.array_equal(wide, stored.float().numpy())


FOUND = """
from express_vllm.backend.cpu import compaction, decode
kernels = [*decode.kernels(False).values(), *decode.kernels(True).values()]
print([kernel.cache_hits for kernel in (compaction._compact, *kernels)])
"""


def test_a_process_finds_the_kernels_that_another_has_compiled():
    """This one has them; compiling them takes ten seconds."""
    assert len(decode.kernels(False)) == len(decode.kernels(True)) == 3
    done = subprocess.run([sys.executable, "-c", FOUND], text=True, capture_output=True)
    assert done.stdout.strip() == "[1, 1, 1, 1, 1, 1, 1]", done.stdout + done.stderr
