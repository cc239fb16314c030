"""`KVSize`: what KV memory is made of in a model, from its real shapes.

Memory is counted in *tokens*: as many bytes as exact attention takes for so many tokens.  The cache
itself has *slots*, in every layer.  Where all layers are equal, a token is a slot of each; wide
layers (wide.py) hold `extra` slots more, and the others fewer for the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from .config import ServerConfig


@dataclass(frozen=True)
class KVSize:
    """Shapes of the layers that grow (layers.py), in all pipeline stages and tensor-parallel ranks
    together."""

    layers: int
    kv_heads: int
    head_size: int
    element_bytes: int
    dtype: str
    #: Slots that wide layers have, together, beside one slot of every layer.
    extra: int = 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token, over all layers and KV heads."""
        return self.layers * self.bytes_in_layer

    @property
    def bytes_in_layer(self) -> int:
        """Bytes of the keys and values of one token in one layer, over its KV heads."""
        return self.kv_heads * 2 * self.head_size * self.element_bytes

    def slots(self, tokens: int) -> int:
        """Slots of an ordinary layer that `tokens` of memory pay for: the one place where a budget
        is divided among layers."""
        return tokens * self.layers // (self.layers + self.extra)

    def tokens(self, slots: int) -> int:
        """Memory that `slots` slots of an ordinary layer take, those of wide layers included."""
        return -(-slots * (self.layers + self.extra) // self.layers)

    @classmethod
    def of(cls, vllm_config: VllmConfig, config: ServerConfig, layers: int) -> KVSize:
        import torch

        model, name = vllm_config.model_config, vllm_config.cache_config.cache_dtype
        dtype = model.dtype if name == "auto" else getattr(torch, name)
        return cls(
            layers, model.get_total_num_kv_heads(), model.get_head_size(), dtype.itemsize,
            str(dtype).removeprefix("torch."),
            len(config.wide_layers or ()) * (config.wide_factor - 1),
        )  # fmt: skip
