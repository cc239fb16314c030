"""How many requests fit: the tables of docs/operations.md, from the functions that the server uses.

    .venv/bin/python deploy/sizing.py            # prints the tables; a test keeps the page equal

A running server answers the same for its own model and pool: POST /v1/express/plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

from express_vllm.budget import resolve
from express_vllm.config import ServerConfig
from express_vllm.kvsize import KVSize
from express_vllm.layers import ModelLayers
from express_vllm.server.plan import Capacity
from express_vllm.settings import Settings

GIB, BLOCK, MAX_LEN = 1 << 30, 16, 131_072
#: Layers, KV heads, head size and bytes per element, from the models' config.json.
MODELS = {
    "SmolLM2-135M": KVSize(30, 3, 64, 2, "bfloat16"),
    "Llama-3.1-8B": KVSize(32, 8, 128, 2, "bfloat16"),
    "Qwen2.5-7B": KVSize(28, 4, 128, 2, "bfloat16"),
    "Llama-3.1-70B": KVSize(80, 8, 128, 2, "bfloat16"),
}
BUDGETS = (1024, 2048, 4096, 8192)
PROMPTS = (1000, 8000, 32_000, 120_000)
ANSWER, POOL, EXAMPLE = 1000, 40, "Llama-3.1-8B"


def fits(size: KVSize, gib: float, prompt: int, answer: int, fields: dict) -> int:
    """Requests that run at once without one waiting for another's blocks."""
    blocks = int(gib * GIB) // (BLOCK * size.bytes_per_token)
    layers = ModelLayers.equal(size.layers)
    settings = Settings(ServerConfig(), size, layers, SimpleNamespace(max_model_len=MAX_LEN))
    budget = resolve(fields, settings, prompt_tokens=prompt, max_tokens=answer)
    stored = prompt + answer - 1
    return Capacity(blocks, BLOCK, 1 << 30, layers).fits(budget.reserved(stored), stored)


def tables() -> str:
    return "\n".join([*memory_table(), "", *fits_table()]) + "\n"


def memory_table() -> Iterator[str]:
    yield (
        "| model (bfloat16) | KiB per token | "
        + " | ".join(f"MiB for {budget:,} tokens" for budget in BUDGETS)
        + " |"
    )
    yield "| --- |" + " --- |" * (1 + len(BUDGETS))
    for name, size in MODELS.items():
        cells = [f"{budget * size.bytes_per_token / 2**20:,.0f}" for budget in BUDGETS]
        yield f"| {name} | {size.bytes_per_token / 1024:g} | " + " | ".join(cells) + " |"


def fits_table() -> Iterator[str]:
    yield (
        f"| {EXAMPLE}, {POOL} GiB of KV cache | exact | "
        + " | ".join(f"{budget:,} tokens" for budget in BUDGETS)
        + " |"
    )
    yield "| --- |" + " --- |" * (1 + len(BUDGETS))
    size = MODELS[EXAMPLE]
    for prompt in PROMPTS:
        ways = [{"express_mode": "exact"}] + [{"express_memory_tokens": b} for b in BUDGETS]
        cells = [f"{fits(size, POOL, prompt, ANSWER, way):,}" for way in ways]
        yield f"| {prompt:,} + {ANSWER:,} tokens | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    print(tables(), end="")
