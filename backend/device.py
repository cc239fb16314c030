"""What the backend asks of the two device paths, and what they may ask of a layer."""

from __future__ import annotations

from typing import Protocol, TypeVar

from torch import Tensor

from express_vllm.softmax import Softmax

#: What a device's metadata builder makes for a step.
Plan = TypeVar("Plan", contravariant=True)


class Layer(Protocol):
    """The sizes of one layer on this rank, and its softmax (`express_vllm.softmax`)."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    soft_cap: float  # of logits; 0: none
    sinks: Tensor | None  # logits of this rank's heads [heads], of the model's type or fp32
    first_kv_head: int  # its index among those of all ranks


def softmax_of(layer: Layer) -> Softmax:
    return Softmax(layer.scale, layer.soft_cap, layer.sinks)


class Path(Protocol[Plan]):
    """One layer's attention."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        plan: Plan,
        output: Tensor,
    ) -> None:
        """Run a step's plan.

        query [T, heads, d], key and value [T, KV heads, d]; kv_cache [blocks, KV heads, slots of a
        page, 2 d], key | value; output [T, heads, d] in place.
        """


class Device(Protocol[Plan]):
    """What one layer needs of the device before it runs."""

    def reserve(self, query: Tensor) -> None:
        """Take what a step may need, while memory is profiled."""

    def path(self, layer: int) -> Path[Plan]:
        """The path of the layer with this global index."""
