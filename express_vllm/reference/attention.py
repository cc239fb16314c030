"""Weighted softmax attention over the live slots of a coreset."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import Segment


def log_weights(segments: Sequence[Segment], dtype: torch.dtype = torch.float64) -> Tensor:
    """Natural log of the weight that every live slot attends with, [live]."""
    return torch.cat(
        [torch.full((s.length,), math.log(2) * s.log2_weight, dtype=dtype) for s in segments]
        or [torch.zeros(0, dtype=dtype)]
    )


def attend(queries: Tensor, keys: Tensor, values: Tensor, logw: Tensor, scale: float) -> Tensor:
    """softmax(scale q.k + log w) v for one KV head: queries [L, G, d], keys and values [S, d].

    The last L slots are the queries' own tokens: query i sees slots [0, S - L + i].  -> [L, G, d].
    Source: Express Language Modeling (arXiv 2606.10944), weighted attention.
    """
    length, slots = queries.shape[0], keys.shape[0]
    scores = torch.einsum("lgd,sd->lgs", queries, keys) * scale + logw
    last = slots - length + torch.arange(length)
    hidden = torch.arange(slots)[None, :] > last[:, None]
    scores = scores.masked_fill(hidden[:, None, :], float("-inf"))
    return torch.softmax(scores, -1) @ values
