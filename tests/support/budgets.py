"""Settings and budgets without an engine."""

from types import SimpleNamespace

from express_vllm import budget
from express_vllm.config import ServerConfig
from express_vllm.kvsize import KVSize
from express_vllm.layers import ModelLayers
from express_vllm.settings import Settings

#: A model of equal layers, and the shapes of SmolLM2-135M with its three wide layers.
EQUAL = KVSize(30, 3, 64, 2, "bfloat16")
WIDE = KVSize(30, 3, 64, 2, "bfloat16", extra=9)


def settings(config=None, max_model_len=8192, size=EQUAL):
    model = SimpleNamespace(max_model_len=max_model_len)
    return Settings(config or ServerConfig(), size, ModelLayers.equal(size.layers), model)


def resolve(fields, config, *, prompt_tokens, max_tokens, max_model_len=8192, size=EQUAL, **more):
    """`budget.resolve` under `config` in a server of a model of this size."""
    return budget.resolve(
        fields, settings(config, max_model_len, size), prompt_tokens=prompt_tokens,
        max_tokens=max_tokens, **more,
    )  # fmt: skip
