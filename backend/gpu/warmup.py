"""Compile the kernels of chunks and compactions at start-up, not in the first request."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch

from express_vllm.layout import layout_for
from express_vllm.settings import Settings
from express_vllm.shape import EXACT_SHAPE, Shape

from ..kernels import warm
from .metadata import Layers

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from express_vllm.config import ServerConfig

logger = logging.getLogger("vllm.express")

#: Slots of the made-up request: what is compiled does not depend on them, memory does.
SLOTS = 2048


def warm_up(vllm_config: VllmConfig, device: torch.device) -> None:
    """Run a made-up request of the server's kind of budgets on pages of its own, ordinary and wide
    ones."""
    context = vllm_config.compilation_config.static_forward_context
    found = [x for x in context.values() if hasattr(getattr(x, "impl", None), "first_kv_head")]
    if not found:
        return
    start = time.monotonic()
    settings = Settings.of(vllm_config)
    shape = made_up(settings.config, settings.most_slots)
    count = 64 if shape.exact else layout_for(shape).position(1)
    for layer in {_variant(x): x for x in found}.values():
        layers = Layers.of([layer])
        _, kv_heads, block_size, width = layers.cache.shape
        warm.warm_up(
            layout_for(shape), count, kv_heads, layers.group_size, width // 2, layers.cache.dtype,
            block_size, layers.softmax, device,
        )  # fmt: skip
    torch.accelerator.synchronize()
    logger.info("express: GPU kernels ready after %.1f s", time.monotonic() - start)


def _variant(layer: Any) -> tuple:
    """What decides which kernels run a layer."""
    impl = layer.impl
    return layer.kv_cache.shape, bool(impl.soft_cap), impl.sinks is None


def made_up(config: ServerConfig, cap: int) -> Shape:
    """A small budget of the kind that the server serves; without one, when models are so short that
    nothing is ever compacted, the shape of requests that keep every token."""
    for slots in (SLOTS, config.memory_tokens):
        try:
            return config.shape(min(slots, config.memory_tokens, cap), config.profile)
        except ValueError:  # too few for the operator's window, interval or heavy hitters
            continue
    return EXACT_SHAPE
