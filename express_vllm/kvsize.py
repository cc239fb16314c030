"""`KVSize`: what one KV slot of a model takes, from the model's real shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from .budget import ServerConfig


@dataclass(frozen=True)
class KVSize:
    """Shapes of the whole model: all pipeline stages and tensor-parallel ranks together."""

    layers: int
    kv_heads: int
    head_size: int
    element_bytes: int
    dtype: str
    #: Slots of wide layers beside one slot of every layer (wide.py).
    extra: int = 0

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot (a key and a value) over all layers and KV heads."""
        slots = self.layers + self.extra
        return slots * self.kv_heads * 2 * self.head_size * self.element_bytes

    @classmethod
    def of(cls, vllm_config: VllmConfig, config: ServerConfig) -> KVSize:
        import torch

        model, name = vllm_config.model_config, vllm_config.cache_config.cache_dtype
        dtype = model.dtype if name == "auto" else getattr(torch, name)
        return cls(
            model.get_total_num_hidden_layers(), model.get_total_num_kv_heads(),
            model.get_head_size(), dtype.itemsize, str(dtype).removeprefix("torch."),
            len(config.wide_layers or ()) * (config.wide_factor - 1),
        )  # fmt: skip
