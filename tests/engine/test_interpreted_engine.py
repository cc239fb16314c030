"""The GPU path without a GPU: Model Runner V2 and the Triton kernels in Triton's interpreter.

A small random model gives the tokens of the CPU path: chunks and decodes, events in both, exact
requests, several budgets in one batch, an ordinary and a wide layer.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import random_families
import torch
from engines import request, run_engine

pytestmark = pytest.mark.server
VOCABULARY = random_families.TINY["vocab_size"]


#: Settings of express and of the model's layers, by its class in transformers.
MODELS = {
    "Llama": ({"wide_layers": [1], "wide_factor": 2}, {}),
    # A layer with a window beside one that grows: two block tables.
    "Gemma3Text": ({}, {
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 48,
        "query_pre_attn_scalar": 8, "tie_word_embeddings": False,
    }),
}  # fmt: skip


@pytest.fixture(
    scope="module", params=["Llama", pytest.param("Gemma3Text", marks=pytest.mark.slow)]
)
def random_model(request, tmp_path_factory):
    """Two layers, 4 query and 2 KV heads of size 32; and the server's settings for it."""
    settings, layers = MODELS[request.param]
    folder = tmp_path_factory.mktemp("random-model")
    return random_families.write_two_layers(folder, f"{request.param}Config", **layers), settings


def test_the_gpu_path_gives_the_tokens_of_the_cpu_path(tmp_path, random_model):
    generator = torch.Generator().manual_seed(4)

    def prompt(count):
        return torch.randint(VOCABULARY, (count,), generator=generator).tolist()

    requests = [
        # 192 are 128 slots and 256 in the wide layer: events from 112 and from 240 on, 32 apart.
        request(prompt(300), 8, memory_tokens=192),
        request(prompt(40), 8, mode="exact"),
        request(prompt(1), 3),
        request(prompt(105), 12, memory_tokens=192, seed=5),
        request(prompt(138), 12, memory_tokens=240, profile="even"),  # an event at 144
        request(prompt(232), 12, memory_tokens=192),
    ]
    calls = [("generate", {"requests": requests})]
    path, settings = random_model
    options = {
        "model": path, "skip_tokenizer_init": True, "block_size": 16,
        "max_num_batched_tokens": 192, "max_model_len": 512,
        "additional_config": {"express": {"memory_tokens": 192, **settings}},
    }  # fmt: skip

    def run(interpret):
        folder = tmp_path / str(interpret)
        folder.mkdir()
        return run_engine(folder, "express", calls, interpret=interpret, **options)

    with ThreadPoolExecutor(2) as pool:  # Triton's interpreter leaves a core idle
        (cpu,), (gpu,) = pool.map(run, (False, True))
    margins = min(min(row) for row in cpu["margins"])
    print(f"smallest gap between the best two tokens: {margins:.4f}")
    assert gpu["tokens"] == cpu["tokens"]
    assert gpu["leaked"] == 0 and gpu["budgets_left"] == 0
