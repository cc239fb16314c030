"""The models that engines and servers of tests run: the small one, or a random one in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import random_llama

from express_vllm import smallmodel
from express_vllm.kvsize import KVSize


@dataclass(frozen=True)
class Model:
    """A model with wide layers, and what its memory is made of in float32."""

    path: Path
    layers: int
    hidden_size: int
    kv_heads: int
    wide_layers: tuple[int, ...]
    wide_factor: int

    @property
    def wide(self) -> dict[str, object]:
        """The server's settings for its wide layers."""
        return {"wide_layers": list(self.wide_layers), "wide_factor": self.wide_factor}

    def size(self, element_bytes: int = 4, dtype: str = "float32") -> KVSize:
        extra = len(self.wide_layers) * (self.wide_factor - 1)
        return KVSize(self.layers, self.kv_heads, 64, element_bytes, dtype, extra)


def small() -> Model:
    """SmolLM2-135M, whose wide layers express knows."""
    return Model(smallmodel.ensure(), 30, 576, 3, (18, 20, 23), 4)


def random(folder: Path) -> Model:
    """Two layers, the second wide, two KV heads; written to `folder`."""
    shape = random_llama.QUICK
    path = random_llama.write(folder, shape)
    return Model(path, shape.layers, random_llama.HIDDEN, shape.kv_heads, (1,), 2)
