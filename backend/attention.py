"""The EXPRESS attention backend: what vLLM asks of a backend, answered for each device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
)
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from express_vllm.conflicts import active, refuse_layer, refuse_unprepared
from express_vllm.device import uses_triton
from express_vllm.scheduler.spec import ExpressSpec

from .device import Device, Layer, Path
from .indices import first_kv_head, layer_index
from .pages import slot_pages


class ExpressBackend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16, torch.bfloat16, torch.float32,
    ]  # fmt: skip
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "EXPRESS"

    @staticmethod
    def get_impl_cls() -> type[ExpressImpl]:
        return ExpressImpl

    @staticmethod
    def get_builder_cls() -> Any:
        return metadata_builder()

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return ExpressSpec.of(spec)

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        """Asked by vLLM's own platforms only; those of this project ask `check_layer`."""
        return ["express-vllm runs on CPUs and on NVIDIA GPUs"]

    @classmethod
    def check_layer(cls, selector: AttentionSelectorConfig) -> None:
        """Refuse layers that express does not cover.  Raises ConflictError naming each reason."""
        refuse_layer(_found(selector))


#: What a layer may differ in.  Scales of a quantized cache go unused: `kv_cache_dtype` is checked.
_FREE = {
    "head_size", "dtype", "kv_cache_dtype", "block_size", "use_per_head_quant_scales", "has_sink",
}  # fmt: skip
_SELECTED = {
    "has_sliding_window": "sliding-window and chunked-local layers",
    "use_rswa": "sliding-window and chunked-local layers",
    "use_mla": "MLA and sparse attention layers",
    "use_sparse": "MLA and sparse attention layers",
    "use_mm_prefix": "multimodal prefix attention",
    "use_non_causal": "prefix-LM and other layers that are not causal",
    "attn_type": "cross and encoder attention",
}
_ARGUMENTS = {
    "alibi_slopes": "ALiBi slopes",
    "sliding_window": "sliding-window and chunked-local layers",
    "kv_sharing_target_layer_name": "KV sharing between layers",
}


def _found(selector: AttentionSelectorConfig) -> Iterator[str]:
    values = {name: value for name, value in selector._asdict().items() if name not in _FREE}
    yield from active(values, selector._field_defaults, _SELECTED)
    if selector.kv_cache_dtype not in (None, "auto", str(selector.dtype).removeprefix("torch.")):
        yield "a KV cache of another type than the model's"
    if uses_triton() and (selector.head_size % 8 or selector.head_size > 256):
        yield "on GPUs, a head size that is no multiple of 8 or is above 256"


class ExpressImpl(AttentionImpl[Any]):
    """Attention of one layer over coresets: dispatches to the device's path."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        arguments = {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name,
            **kwargs,
        }
        refuse_layer(active(arguments, {}, _ARGUMENTS))
        refuse_unprepared(get_current_vllm_config())
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.soft_cap = float(logits_soft_cap or 0.0)
        self.sinks = sinks  # the model's own parameter: its weights are loaded later
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.first_kv_head = first_kv_head(self.num_kv_heads)
        self._path: Path[Any] | None = None
        self._device: Device[Any] = device_of(self, get_current_vllm_config())

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query [T, heads, d], key and value [T, KV heads, d] -> output [T, heads, d] in place.

        kv_cache: [blocks, KV heads, block size, 2 d], key | value; more KV heads stand for more
        slots in wide layers (`slot_pages`).
        """
        if attn_metadata is None:  # memory is being profiled
            self._device.reserve(query)
            return output.zero_()
        if self._path is None:
            self._path = self._device.path(layer_index(layer.layer_name))
        pages = slot_pages(kv_cache, self.num_kv_heads)
        self._path.forward(query, key, value, pages, attn_metadata, output)
        return output


def device_of(layer: Layer, vllm_config: Any) -> Device[Any]:
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
