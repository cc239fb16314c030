"""What the backend asks of the two device paths, and what they may ask of a layer."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor
from vllm.v1.attention.backend import AttentionMetadataBuilder

from express_vllm.device import uses_triton


class Layer(Protocol):
    """The sizes of one layer on this rank."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    first_kv_head: int  # its index among those of all ranks


class Path(Protocol):
    """One layer's attention."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        plan: Any,
        output: Tensor,
    ) -> None:
        """Run a step's plan, which the device's metadata builder has made.

        query [T, heads, d], key and value [T, KV heads, d]; kv_cache [blocks, KV heads, slots of a
        page, 2 d], key | value; output [T, heads, d] in place.
        """


class Device(Protocol):
    """What one layer needs of the device before it runs."""

    def reserve(self, query: Tensor) -> None:
        """Take what a step may need, while memory is profiled."""

    def path(self, layer: int) -> Path:
        """The path of the layer with this global index."""


def device_of(layer: Layer, vllm_config: Any) -> Device:
    # Imported here: only one device's kernels can be loaded, or are wanted, on a machine.
    if uses_triton():
        from .gpu.device import GpuDevice

        return GpuDevice(layer, vllm_config)
    from .cpu.device import CpuDevice

    return CpuDevice(layer)


def metadata_builder() -> type[AttentionMetadataBuilder[Any]]:
    """Makes the plans that the device's paths run."""
    if uses_triton():  # imported here: as in `device_of`
        from .gpu.metadata import ExpressMetadataBuilder as GpuBuilder

        return GpuBuilder
    from .cpu.metadata import ExpressMetadataBuilder as CpuBuilder

    return CpuBuilder
