"""Wide layers: the few layers that find old tokens again hold more slots than the others.

What a small cache costs is not spread evenly: in the model that was measured one of 30 layers
causes a quarter of the loss, and three together nearly half of it (docs/results/layers.md).  Heads
that retrieve old tokens are few in every model of arXiv 2404.15574, too.  A wide layer holds
`factor` times the slots of an ordinary one.  Its page has `factor` times the bytes, so that one
block table serves all layers; a request's memory counts all of them (kvsize.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from .config import ServerConfig
from .fields import BudgetError


class ModelShape(NamedTuple):
    """What tells a model and its fine-tuned offspring from others."""

    kind: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """Of a Hugging Face configuration."""
        return cls(
            config.model_type, config.num_hidden_layers, config.hidden_size,
            config.num_attention_heads, config.num_key_value_heads, config.vocab_size,
        )  # fmt: skip


class Wide(NamedTuple):
    layers: tuple[int, ...]
    factor: int


#: Found with `python -m bench.quality sweep --axes layers wide` (docs/results/layers.md).
MEASURED = {
    ModelShape("llama", 30, 576, 9, 3, 49152): Wide((18, 20, 23), 4),  # SmolLM2-135M
}


def settle(config: ServerConfig, hf_config: Any) -> ServerConfig:
    """The configuration with its wide layers, of the model `hf_config`.

    Raises BudgetError for layers that the model does not have.
    """
    if config.wide_layers is None:
        return _known(config, hf_config)
    layers = hf_config.num_hidden_layers
    if any(layer >= layers for layer in config.wide_layers):
        raise BudgetError(
            "express.wide_layers", list(config.wide_layers),
            f"the model's layers are 0 to {layers - 1}",
        )  # fmt: skip
    return config


def _known(config: ServerConfig, hf_config: Any) -> ServerConfig:
    try:
        found = MEASURED.get(ModelShape.of(hf_config))
    except AttributeError:  # a configuration of another make
        found = None
    if found is None:
        return replace(config, wide_layers=())
    return replace(config, wide_layers=found.layers, wide_factor=found.factor)
