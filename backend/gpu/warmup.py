"""Compile the kernels of chunks and compactions at start-up, not in the first request."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch

from express_vllm.layout import EXACT_SHAPE, Layout, Shape, layout_for
from express_vllm.platforms.common import server_config

from ..kernels.step import Chunk, StepPlan, compact_pages, run_chunks
from .metadata import LayerGroup
from .path import side_stream

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.express")


def warm_up(vllm_config: VllmConfig, device: torch.device) -> None:
    """Run a made-up request of the default budget on pages of its own."""
    context = vllm_config.compilation_config.static_forward_context
    layers = [x for x in context.values() if hasattr(getattr(x, "impl", None), "first_kv_head")]
    if not layers:
        return
    start = time.monotonic()
    config = server_config(vllm_config)
    cap = config.memory_cap(vllm_config.model_config.max_model_len)
    shape = config.shape(min(config.memory_tokens, cap), config.profile)
    _run(LayerGroup.of(layers[:1]), shape, device)
    torch.accelerator.synchronize()
    logger.info("express: GPU kernels ready after %.1f s", time.monotonic() - start)


def _run(layers: LayerGroup, shape: Shape, device: torch.device) -> None:
    _, kv_heads, block_size, width = layers.cache.shape
    options: dict[str, Any] = {"dtype": layers.cache.dtype, "device": device}
    blocks = -(-shape.slots // block_size)
    cache = torch.randn(blocks, kv_heads, block_size, width, **options)
    table = torch.arange(blocks, dtype=torch.int32, device=device)[None]
    count = shape.first_event + shape.interval
    query = torch.randn(count, layers.group * kv_heads, width // 2, **options)
    key, value = torch.randn(2, count, kv_heads, width // 2, **options)
    output = torch.empty_like(query)
    zero = torch.zeros(1, dtype=torch.int64, device=device)

    def chunk(layout: Layout, start: int, stop: int) -> None:
        plan = StepPlan.make(layout, [Chunk(start, stop)], layers.group, device)
        run_chunks(
            plan, query, key, value, cache, table, 0, 0, layers.scale, output,
            side=side_stream(device),
        )  # fmt: skip

    layout = layout_for(shape)
    chunk(layout_for(EXACT_SHAPE), 0, min(64, count))
    chunk(layout, 0, count)
    plan = StepPlan.make(layout, [Chunk(count, count + 1)], layers.group, device, compacting=True)
    compact_pages(plan, cache, zero, zero, table, 0, layers.scale, layers.group)
