"""Settings and budgets without an engine."""

from types import SimpleNamespace

from express_vllm import budget
from express_vllm.config import ServerConfig
from express_vllm.kvsize import KVSize
from express_vllm.settings import Settings

#: A model of equal layers, and the shapes of SmolLM2-135M with its three wide layers.
EQUAL = KVSize(30, 3, 64, 2, "bfloat16")
WIDE = KVSize(30, 3, 64, 2, "bfloat16", extra=9)


def settings(config=None, max_model_len=8192, size=EQUAL):
    return Settings(config or ServerConfig(), size, SimpleNamespace(max_model_len=max_model_len))


def resolve(fields, config, *, prompt_tokens, max_tokens, max_model_len=8192, size=EQUAL, **more):
    """`budget.resolve` under `config` in a server of a model of this size."""
    return budget.resolve(
        fields, settings(config, max_model_len, size), prompt_tokens=prompt_tokens,
        max_tokens=max_tokens, **more,
    )  # fmt: skip
