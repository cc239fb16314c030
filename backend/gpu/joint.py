"""The softmax of layers that one launch compacts: sinks of each, all else alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from express_vllm.conflicts import refuse_layer
from express_vllm.softmax import Softmax

if TYPE_CHECKING:
    from ..device import Layer


def require_alike(layers: Sequence[Layer]) -> None:
    """Raise ConflictError if one launch cannot compact these layers."""
    types = {layer.sinks.dtype for layer in layers if layer.sinks is not None}
    if len({(layer.scale, layer.soft_cap) for layer in layers}) > 1 or len(types) > 1:
        refuse_layer(["on GPUs, scales or soft caps that differ between layers"])


def joint_softmax(layers: Sequence[Layer]) -> Softmax:
    """Of layers that are alike.  If only some have sinks, the others get sinks of -inf, which take
    nothing."""
    softmax = Softmax(layers[0].scale, layers[0].soft_cap)
    given = [layer.sinks for layer in layers]
    some = [sinks for sinks in given if sinks is not None]
    if not some:
        return softmax
    # What offsets count from lives as long as the result; parameters live with their layers.
    base = some[0] if len(some) == len(given) else torch.full_like(some[0], -torch.inf)
    starts = [(base if sinks is None else sinks).data_ptr() for sinks in given]
    offsets = [(start - base.data_ptr()) // base.element_size() for start in starts]
    return softmax._replace(
        sinks=base, offsets=torch.tensor(offsets, dtype=torch.int64).to(base.device)
    )
