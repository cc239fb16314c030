"""Soft caps and sinks about as large as the logits, so that a path that leaves them out fails."""

import torch

from express_vllm.softmax import Softmax


def random_softmax(
    head_size, heads, cap=0.0, sinks=None, dtype=torch.float32, device="cpu", seed=0
):
    """`sinks`: their mean over the query heads, None for none."""
    if sinks is not None:
        spread = 2 * torch.randn(heads, generator=torch.Generator().manual_seed(seed))
        sinks = (sinks + spread).to(dtype).to(device)
    return Softmax(head_size**-0.5, cap, sinks)
