"""The EXPRESS attention backend: what vLLM asks of a backend, answered for each device."""

from __future__ import annotations

import importlib
import os
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionType
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from express_vllm.conflicts import refuse_layer
from express_vllm.scheduler.spec import ExpressSpec

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
        return device_module("metadata").ExpressMetadataBuilder

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
    def check_layer(cls, selector: Any) -> None:
        """Refuse layers that express does not cover.  Raises ConflictError naming each reason."""
        active = {
            "sliding-window and chunked-local layers": selector.has_sliding_window,
            "attention sinks of the model": selector.has_sink,
            "sparse attention layers": selector.use_mla or selector.use_sparse,
            "multimodal prefix attention": selector.use_mm_prefix,
            "cross and encoder attention": selector.attn_type != AttentionType.DECODER,
        }
        refuse_layer(name for name, found in active.items() if found)


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
        **kwargs: Any,
    ) -> None:
        active = {
            "ALiBi slopes": alibi_slopes,
            "sliding-window and chunked-local layers": sliding_window,
            "logits soft caps": logits_soft_cap,
            "KV sharing between layers": kv_sharing_target_layer_name,
            "attention sinks of the model": kwargs.pop("sinks", None),
            **kwargs,
        }
        refuse_layer(name for name, value in active.items() if value is not None and value != 0)
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.first_kv_head = first_kv_head(self.num_kv_heads)
        self._path: Any = None
        self._device = device_module("device").Device(self, get_current_vllm_config())

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


def uses_triton() -> bool:
    """Whether the Triton kernels run: on a GPU or, for tests, in Triton's interpreter."""
    return current_platform.is_cuda() or os.environ.get("TRITON_INTERPRET") == "1"


def device_module(name: str) -> Any:
    return importlib.import_module(f"{__package__}.{'gpu' if uses_triton() else 'cpu'}.{name}")


def layer_index(name: str) -> int:
    """The global index of the decoder layer `name`: it feeds the seed, on every pipeline rank."""
    from vllm.model_executor.models.utils import extract_layer_index

    return extract_layer_index(name)


def first_kv_head(local_heads: int) -> int:
    """Global index of this tensor-parallel rank's first KV head."""
    from vllm.distributed import get_tensor_model_parallel_rank

    config = get_current_vllm_config()
    total = config.model_config.get_total_num_kv_heads()
    rank, size = get_tensor_model_parallel_rank(), config.parallel_config.tensor_parallel_size
    return rank * total // size if total < size else rank * local_heads
