"""Kernels of a server's kind of budgets, compiled before the first request."""

from __future__ import annotations

from typing import Any

import torch

from express_vllm.layout import Layout
from express_vllm.softmax import Softmax

from ..chunk import Chunk
from .plan import StepPlan
from .span import cdiv
from .step import compact_pages, run_chunks


def warm_up(
    layout: Layout, count: int, heads: int, group: int, size: int, dtype: torch.dtype,
    block_size: int, softmax: Softmax, device: torch.device,
) -> None:  # fmt: skip
    """Compile what any step of any budget of this layout's kind launches: run a made-up request of
    `count` tokens.  One that reaches no event needs no more than its kernels."""
    blocks = cdiv(min(layout.shape.slots, count + 1), block_size)
    options: Any = {"dtype": dtype, "device": device}
    cache = torch.zeros(blocks, heads, block_size, 2 * size, **options)
    table = torch.arange(blocks, dtype=torch.int32, device=device)[None]
    query = torch.ones(count, heads * group, size, **options)
    key, value = torch.ones(2, count, heads, size, **options)
    output = torch.empty_like(query)
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    for start, stop in ((0, count - 2), (count - 2, count)):
        chunk = StepPlan.make([Chunk(layout, start, stop)], group, device)
        run_chunks(
            chunk, query[start:stop], key[start:stop], value[start:stop], cache, table, 0, 0,
            softmax, output[start:stop], side=side,
        )  # fmt: skip
    if layout.events(count, count + 1):
        event = StepPlan.make([Chunk(layout, count, count + 1)], group, device, compacting=True)
        compact_pages(event, cache, zero, zero, table, 0, softmax, group)
