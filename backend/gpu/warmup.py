"""Compile the kernels of chunks and compactions at start-up, not in the first request."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch

from express_vllm.layout import MIN_SLOTS, layout_for
from express_vllm.platforms.common import server_config

from ..kernels import step
from .metadata import LayerGroup

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.express")


def warm_up(vllm_config: VllmConfig, device: torch.device) -> None:
    """Run a made-up request of the default budget on pages of its own, ordinary and wide ones."""
    context = vllm_config.compilation_config.static_forward_context
    found = [x for x in context.values() if hasattr(getattr(x, "impl", None), "first_kv_head")]
    if not found:
        return
    start = time.monotonic()
    config = server_config(vllm_config)
    cap = config.memory_cap(vllm_config.model_config.max_model_len)
    # No request of a shorter server has an event; its chunks run the same kernels.
    slots = max(min(config.memory_tokens, cap), MIN_SLOTS)
    shape = config.shape(slots, config.profile)
    for layer in {x.kv_cache.shape: x for x in found}.values():
        layers = LayerGroup.of([layer])
        _, kv_heads, block_size, width = layers.cache.shape
        step.warm_up(
            layout_for(shape), kv_heads, layers.group, width // 2, layers.cache.dtype, block_size,
            device,
        )  # fmt: skip
    torch.accelerator.synchronize()
    logger.info("express: GPU kernels ready after %.1f s", time.monotonic() - start)
