"""Weighted softmax attention over the live slots of a coreset."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import Segment
from ..softmax import Softmax


def log_weights(segments: Sequence[Segment], dtype: torch.dtype = torch.float64) -> Tensor:
    """Natural log of the weight that every live slot attends with, [live]."""
    return torch.cat(
        [torch.full((s.length,), math.log(2) * s.log2_weight, dtype=dtype) for s in segments]
        or [torch.zeros(0, dtype=dtype)]
    )


def logits(products: Tensor, softmax: Softmax) -> Tensor:
    """Of products q.k; without log-weights."""
    scores = products * softmax.scale
    return softmax.cap * torch.tanh(scores / softmax.cap) if softmax.cap else scores


def shares(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension of scores [..., S] and the sinks [...], if there are some."""
    if sinks is None:
        return torch.softmax(scores, -1)
    sinks = sinks.to(scores).expand(scores.shape[:-1])[..., None]
    return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]


def attend(queries: Tensor, keys: Tensor, values: Tensor, logw: Tensor, softmax: Softmax) -> Tensor:
    """softmax(scale q.k + log w) v for one KV head: queries [L, G, d], keys and values [S, d].

    The last L slots are the queries' own tokens: query i sees slots [0, S - L + i].  The sinks of
    `softmax` are those of the KV head, [G].  -> [L, G, d].
    Source: Express Language Modeling (arXiv 2606.10944), weighted attention.
    """
    length, slots = queries.shape[0], keys.shape[0]
    scores = logits(torch.einsum("lgd,sd->lgs", queries, keys), softmax) + logw
    last = slots - length + torch.arange(length)
    hidden = torch.arange(slots)[None, :] > last[:, None]
    scores = scores.masked_fill(hidden[:, None, :], float("-inf"))
    return shares(scores, softmax.sinks) @ values
