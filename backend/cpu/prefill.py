"""Attention of consecutive tokens over a dense, weighted state that they extend."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from express_vllm.softmax import Softmax

TILE = 128


def attend_piece(
    queries: Tensor, state: Tensor, bias: np.ndarray | None, softmax: Softmax, output: Tensor
) -> None:
    """Causal weighted attention: queries [L, KV heads, G, d] over state fp32 [KV heads, S, 2 d].

    The last L slots are the queries' own tokens; `bias` [S - L] is log w of the slots before them.
    Writes `output` [L, KV heads, G, d].
    """
    length, heads, group, size = queries.shape
    before = state.shape[1] - length
    keys, values = state[..., :size], state[..., size:]
    weights = None if bias is None else torch.from_numpy(bias)
    cap, scale = softmax.cap, softmax.scale / (softmax.cap or 1.0)
    for first in range(0, length, TILE):
        last = min(first + TILE, length)
        count, slots = last - first, before + last
        rows = queries[first:last].permute(1, 2, 0, 3).float() * scale
        scores = rows.reshape(heads, group * count, size) @ keys[:, :slots].transpose(1, 2)
        if cap:
            scores.tanh_().mul_(cap)
        if weights is not None:
            scores[..., :before] += weights
        scores = scores.view(heads, group, count, slots)
        scores[..., slots - count :].masked_fill_(_future(count), float("-inf"))
        result = _shares(scores, softmax).flatten(1, 2) @ values[:, :slots]
        result = result.view(heads, group, count, size).permute(2, 0, 1, 3)
        output[first:last] = result.to(output.dtype)


def _shares(scores: Tensor, softmax: Softmax) -> Tensor:
    """Softmax of logits [KV heads, G, L, S] and of the sinks."""
    if softmax.sinks is None:
        return torch.softmax(scores, -1)
    sinks = softmax.sinks.detach().float().view(*scores.shape[:2], 1, 1)
    total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), sinks)
    return scores.sub_(total).exp_()


_MASKS: dict[int, Tensor] = {}


def _future(count: int) -> Tensor:
    if count not in _MASKS:
        _MASKS[count] = torch.ones(count, count, dtype=torch.bool).triu(1)
    return _MASKS[count]
