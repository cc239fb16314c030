"""Kernel halving: one of each pair, in order, seeded, and better than a coin."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from express_vllm.reference.halving import halve, kernel_matrix, pair_differences


def points(size, head_size, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, size, head_size)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 64),
    st.sampled_from([64, 96]),
    st.integers(0, 2**62),
    st.sampled_from(["gaussian", "exponential"]),
)
def test_keeps_one_of_each_pair(pairs, head_size, key, kind):
    keys, values = points(2 * pairs, head_size, key % 1000)
    kept = halve(keys, values, key, 3, kind=kind)
    assert torch.equal(kept // 2, torch.arange(pairs))
    assert torch.equal(kept, halve(keys, values, key, 3, kind=kind))


def test_different_keys_choose_differently():
    keys, values = points(128, 64, 0)
    choices = {tuple(halve(keys, values, key, 0, kind="gaussian").tolist()) for key in range(20)}
    assert len(choices) > 1
    ops = {tuple(halve(keys, values, 7, op, kind="gaussian").tolist()) for op in range(20)}
    assert len(ops) > 1


def test_odd_sizes_are_refused():
    keys, values = points(7, 64, 0)
    with pytest.raises(ValueError, match="even number of points, got 7"):
        halve(keys, values, 0, 0, kind="gaussian")


@pytest.mark.parametrize("kind", ["gaussian", "exponential"])
def test_kernel_is_symmetric_positive_definite(kind):
    keys, values = points(40, 64, 1)
    kernel = kernel_matrix(keys, values, kind)
    assert torch.allclose(kernel, kernel.T)
    assert torch.linalg.eigvalsh(kernel).min() > -1e-9 * kernel.abs().max()
    assert pair_differences(kernel).diagonal().min() >= 0


def discrepancy(kernel, kept):
    """|mean embedding of all - mean embedding of the kept|^2 in the kernel's space."""
    size = kernel.shape[0]
    weight = torch.full((size,), 1.0 / size, dtype=kernel.dtype)
    weight[kept] -= 2.0 / size
    return float(weight @ kernel @ weight)


def test_halving_beats_a_coin():
    """On clustered points the kept half represents the whole better than a random half of pairs."""
    ours = coin = 0.0
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        centres = 2.0 * torch.randn(4, 16, generator=generator, dtype=torch.float64)
        label = torch.randint(4, (128,), generator=generator)
        keys = centres[label] + 0.3 * torch.randn(128, 16, generator=generator, dtype=torch.float64)
        values = torch.randn(128, 16, generator=generator, dtype=torch.float64)
        kernel = kernel_matrix(keys, values, "gaussian")
        ours += discrepancy(kernel, halve(keys, values, seed, 0, kind="gaussian"))
        pick = 2 * torch.arange(64) + torch.randint(2, (64,), generator=generator)
        coin += discrepancy(kernel, pick)
    assert ours < 0.8 * coin
