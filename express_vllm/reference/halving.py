"""Kernel halving KH(delta): keep one point of each pair so that attention hardly changes.

Source: Low-Rank Thinning (arXiv 2502.12063), self-balancing walk on the attention kernel; the
`gaussian` kernel with greedy signs is this project's variant (docs/algorithm.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import rng

#: Failure probability of the published threshold.
DELTA = 0.5


def kernel_matrix(keys: Tensor, values: Tensor, kind: str) -> Tensor:
    """The attention kernel of S points, [S, S], from keys [S, d] and values [S, d].

    `exponential`: exp((<k, k'> - shift) / sqrt(d)) (<v, v'> + b^2), shift = max |k|^2, on keys
    centred on their mean (softmax does not see a constant added to every key).
    `gaussian`: the same normalised to a unit diagonal, exp(-|k - k'|^2 / (2 sqrt(d))) (...).
    b is the largest |v| entry.
    """
    scale = 1.0 / math.sqrt(keys.shape[-1])
    bound = values.abs().max()
    value_part = values @ values.T + bound * bound
    if kind == "gaussian":
        norms = (keys * keys).sum(-1)
        distance = (norms[:, None] + norms[None, :] - 2.0 * (keys @ keys.T)).clamp_min(0.0)
        return torch.exp(-0.5 * scale * distance) * value_part
    if kind != "exponential":
        raise ValueError(f"kernel {kind!r} is not one of exponential, gaussian")
    centred = keys - keys.mean(0)
    shift = (centred * centred).sum(-1).max()
    return torch.exp((centred @ centred.T - shift) * scale) * value_part


def pair_differences(kernel: Tensor) -> Tensor:
    """D [P, P] of the pairs (x_2i, x_2i+1): k(x, y) - k(x, y') - k(x', y) + k(x', y')."""
    rows = kernel[0::2] - kernel[1::2]
    return rows[:, 0::2] - rows[:, 1::2]


def halve(keys: Tensor, values: Tensor, event_key: int, op: int, *, kind: str) -> Tensor:
    """Indices [S/2] of the kept points, one of each consecutive pair, in order.

    `exponential` uses the published random threshold, `gaussian` the greedy sign (threshold 0),
    `uniform` tosses a coin for every pair (the baseline that looks at nothing).  Random bits come
    from (`event_key`, `op`, pair index) alone.  Computes in the inputs' dtype.
    """
    size = keys.shape[0]
    if size % 2:
        raise ValueError(f"halving needs an even number of points, got {size}")
    if kind == "uniform":
        coins = [rng.bits(event_key, op, rng.STREAM_SIGN, i) & 1 for i in range(size // 2)]
        return torch.tensor([2 * i + coin for i, coin in enumerate(coins)], dtype=torch.long)
    difference = pair_differences(kernel_matrix(keys, values, kind))
    psi = torch.zeros_like(difference[0])
    largest = 0.0
    kept = []
    flip = rng.bits(event_key, op, rng.STREAM_COMPLEMENT, 0) & 1
    for i in range(size // 2):
        draw = rng.bits(event_key, op, rng.STREAM_SIGN, i)
        scale = math.sqrt(max(float(difference[i, i]), 0.0))
        largest = max(largest, scale)
        threshold = scale * largest * (0.5 + math.log(2 * size / DELTA))
        positive = _positive(float(psi[i]), threshold, draw, kind)
        psi += difference[i] if positive else -difference[i]
        kept.append(2 * i + (int(positive) ^ 1 ^ flip))
    return torch.tensor(kept, dtype=torch.long)


def _positive(psi: float, threshold: float, draw: int, kind: str) -> bool:
    """The walk's sign: against psi, or at random in proportion when a threshold is given."""
    if kind == "exponential" and threshold > 0.0:
        return (2.0 * rng.uniform(draw) - 1.0) * threshold > psi
    return bool(draw & 1) if psi == 0.0 else psi < 0.0
