"""Attention sinks as the CPU kernels read them: fp32, by KV head, and a low logit for none."""

from __future__ import annotations

import numpy as np

from express_vllm.shape import RING_ROWS
from express_vllm.softmax import Softmax

#: No logit is lower; its exponential is exactly 0 beside any other (`scalar.fast_exp`).
LOW = np.float32(-3.0e38)


def head_sinks(softmax: Softmax, kv_heads: int, group: int) -> np.ndarray:
    """[KV heads, group]."""
    if softmax.sinks is None:
        return np.full((kv_heads, group), LOW, np.float32)
    sinks = softmax.sinks.detach().float().contiguous().numpy()
    return np.maximum(sinks, LOW).reshape(kv_heads, group)


def row_sinks(softmax: Softmax, kv_heads: int) -> np.ndarray:
    """Of an event's query rows, for which a group's heads take turns: [KV heads, RING_ROWS]."""
    group = 1 if softmax.sinks is None else len(softmax.sinks) // kv_heads
    turns = np.arange(RING_ROWS) % group
    return np.ascontiguousarray(head_sinks(softmax, kv_heads, group)[:, turns])
