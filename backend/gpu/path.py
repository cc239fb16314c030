"""One layer's attention on the GPU: decodes through tables that a graph captures, then chunks."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from express_vllm.softmax import Softmax

from ..kernels.decode import DecodeScratch, decode_attention, store_tokens
from ..kernels.step import run_chunks

if TYPE_CHECKING:
    from .metadata import ExpressMetadata


class GpuPath:
    """Runs a step's plan for one layer."""

    def __init__(
        self, layer: int, first_kv_head: int, softmax: Softmax, scratch: DecodeScratch
    ) -> None:
        self.layer = layer
        self.first_kv_head = first_kv_head
        self.softmax = softmax
        self.scratch = scratch
        self.side = side_stream(scratch.part.device)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        plan: ExpressMetadata,
        output: Tensor,
    ) -> None:
        """query [T, heads, d], key and value [T, KV heads, d], output [T, heads, d] in place."""
        if plan.idle:
            output.zero_()
        if (decodes := plan.decodes) is not None:
            rows = slice(0, decodes.count)
            store_tokens(
                query[rows], key[rows], value[rows], kv_cache, plan.table, decodes.live,
                decodes.ring,
            )  # fmt: skip
            decode_attention(
                query[rows], kv_cache, plan.table, decodes.live, decodes.starts, decodes.rises,
                self.softmax, self.scratch, output[rows],
            )  # fmt: skip
        for chunk in plan.chunks:
            run_chunks(
                chunk, query, key, value, kv_cache, plan.table, self.layer, self.first_kv_head,
                self.softmax, output, side=self.side, timed=plan.timer.span,
            )  # fmt: skip


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Where events run while attention fills the other multiprocessors."""
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
