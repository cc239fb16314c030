"""`Settings`: what one engine runs with; parsed once from vLLM's configuration, read everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .config import ServerConfig
from .fields import BudgetError, Fields, limited
from .kvsize import KVSize
from .layers import ModelLayers
from .plugin import BACKEND_NAME
from .shape import MIN_SLOTS
from .wide import settle

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

#: Where a VllmConfig keeps its settings: processes that it is sent to need not parse again.
ATTRIBUTE = "express_settings"


def chosen(vllm_config: VllmConfig) -> bool:
    """Whether the user gave `--attention-backend express`, or express for one kind of layer."""
    config = vllm_config.attention_config
    backends = [config.backend, *config.backend_per_kind.values()]
    return any(backend is not None and backend.name == BACKEND_NAME for backend in backends)


@dataclass(frozen=True)
class Settings:
    """The operator's configuration with the model's wide layers, and the model's sizes.

    The maximal length is read anew every time: with `--max-model-len auto` the engine settles it
    after all else is made.
    """

    config: ServerConfig
    size: KVSize
    layers: ModelLayers
    model: ModelConfig

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Settings:
        """The settings of an engine.  Raises BudgetError the first time."""
        return getattr(vllm_config, ATTRIBUTE, None) or cls.parse(vllm_config)

    @classmethod
    def parse(cls, vllm_config: VllmConfig) -> Settings:
        """Read `--additional-config '{"express": ...}'` and keep what it says for `of`."""
        extra, model = vllm_config.additional_config, vllm_config.model_config
        raw: Any = extra.get("express", {}) if isinstance(extra, dict) else {}
        layers = ModelLayers.of(model)
        config = settle(ServerConfig.parse(raw), model.hf_text_config)
        size = KVSize.of(vllm_config, config, len(layers.growing))
        settings = cls(config, size, layers, model)
        settings._check()
        setattr(vllm_config, ATTRIBUTE, settings)
        return settings

    def _check(self) -> None:
        config, least = self.config, self.least_tokens
        if config.wide_layers and self.layers.bounded:
            raise BudgetError(
                "express.wide_layers", list(config.wide_layers),
                "it must be []: some of this model's layers are bounded by themselves, and their "
                "blocks come from the same pool",
            )  # fmt: skip
        if config.memory_tokens < least:
            raise BudgetError(
                "express.memory_tokens", config.memory_tokens,
                f"with this model's wide layers it must be at least {least}",
            )  # fmt: skip
        config.check_slots(self.size.slots(config.memory_tokens))

    @property
    def max_model_len(self) -> int:
        return self.model.max_model_len

    @property
    def least_tokens(self) -> int:
        """What the smallest cache takes."""
        return self.size.tokens(MIN_SLOTS)

    @property
    def min_memory_tokens(self) -> int:
        """The least that a request may ask for."""
        return max(self.config.min_memory_tokens, self.least_tokens)

    @property
    def max_memory_tokens(self) -> int:
        """The most that any request may hold: what the longest takes when every token is kept."""
        most = self.size.tokens(self.max_model_len)
        return min(self.config.max_memory_tokens or most, most)

    @property
    def most_slots(self) -> int:
        """The most slots that any request holds in an ordinary layer."""
        return self.size.slots(self.max_memory_tokens)

    @property
    def fields(self) -> type[Fields]:
        """What a request may say, within these limits."""
        return limited(self.least_tokens, self.min_memory_tokens, self.max_memory_tokens)
