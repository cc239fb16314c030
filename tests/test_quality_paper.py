"""The paper's experiments: what would make their comparisons unfair fails here."""

from __future__ import annotations

import math

import pytest
import torch

from bench.quality.paper import hyper
from bench.quality.paper.hyper import Hyper


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
