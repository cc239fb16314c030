"""What the kernels compute, in plain torch on the kernels' own arguments: slow and obvious.

Compaction's reference is `express_vllm.reference.cache.ExpressCache`, which starts from tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from express_vllm.layout import Segment
from express_vllm.reference.attention import attend, log_weights
from express_vllm.softmax import Softmax


def live_rows(kv_cache: Tensor, blocks: Tensor, live: int) -> Tensor:
    """Slots [0, live) of one request, fp64 [KV heads, live, 2 d]; blocks: its block-table row."""
    rows = kv_cache[blocks.long()].transpose(0, 1).flatten(1, 2)
    return rows[:, :live].double()


def decode_attention(
    query: Tensor, kv_cache: Tensor, blocks: Tensor, segments: list[Segment], softmax: Softmax
) -> Tensor:
    """Weighted attention of one token [heads, d], whose own slot is the last, in fp64."""
    live = sum(s.length for s in segments)
    rows = live_rows(kv_cache, blocks, live).cpu()
    heads, size = rows.shape[0], rows.shape[2] // 2
    groups = query.double().cpu().view(heads, 1, -1, size)
    logw = log_weights(segments)
    outputs = [
        attend(q, r[:, :size], r[:, size:], logw, softmax.of_kv_head(h, heads))
        for h, (q, r) in enumerate(zip(groups, rows, strict=True))
    ]
    return torch.cat(outputs).flatten(0, 1)


def exact_attention(query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
    """Causal attention in fp64: query [T, heads, d], key and value [T, KV heads, d]."""
    count, heads, size = query.shape
    groups = query.double().cpu().view(count, key.shape[1], -1, size)
    logw = torch.zeros(count, dtype=torch.float64)
    outputs = [
        attend(
            groups[:, h], key[:, h].double().cpu(), value[:, h].double().cpu(), logw,
            softmax.of_kv_head(h, key.shape[1]),
        )
        for h in range(key.shape[1])
    ]  # fmt: skip
    return torch.stack(outputs, 1).view(count, heads, size)
