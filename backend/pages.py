"""The pages of a layer as its slots lie in them."""

from __future__ import annotations

from torch import Tensor


def slot_pages(kv_cache: Tensor, kv_heads: int) -> Tensor:
    """vLLM's [blocks, KV heads * factor, block size, 2 d] -> [blocks, KV heads, factor * block
    size, 2 d], without a copy; `factor` is 1 but in wide layers (scheduler.spec)."""
    if kv_cache.shape[1] == kv_heads:
        return kv_cache
    return kv_cache.unflatten(1, (kv_heads, -1)).flatten(2, 3)
