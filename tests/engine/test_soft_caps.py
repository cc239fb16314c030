"""A model with soft caps on every layer: a small random Gemma 2 without sliding windows."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import random_families
import torch
from engines import request, run_engine

pytestmark = pytest.mark.server
VOCABULARY = random_families.TINY["vocab_size"]


@pytest.fixture(scope="module")
def capped_model(tmp_path_factory):
    """Two layers, 4 query and 2 KV heads of size 32; logits about as large as their cap."""
    return random_families.write_two_layers(
        tmp_path_factory.mktemp("capped-model"), "Gemma2Config", initializer_range=0.2,
        query_pre_attn_scalar=32, attn_logit_softcapping=2.0, sliding_window=None,
        layer_types=[random_families.FULL] * 2,
    )  # fmt: skip


def test_a_model_with_soft_caps_gives_vllms_tokens_and_both_paths_the_same(tmp_path, capped_model):
    """What fits its budget is exact attention; the third request has events."""
    generator = torch.Generator().manual_seed(4)

    def prompt(count):
        return torch.randint(VOCABULARY, (count,), generator=generator).tolist()

    requests = [
        request(prompt(90), 6, memory_tokens=128),
        request(prompt(33), 6, mode="exact"),
        request(prompt(139), 6, memory_tokens=128),
    ]
    options = {
        "model": capped_model, "skip_tokenizer_init": True, "block_size": 32,
        "max_num_batched_tokens": 128, "max_model_len": 256,
    }  # fmt: skip

    def run(job):
        backend, interpret = job
        folder = tmp_path / f"{backend}-{interpret}"
        folder.mkdir()
        calls = [("generate", {"requests": requests})]
        return run_engine(folder, backend, calls, interpret=interpret, **options)[0]["tokens"]

    with ThreadPoolExecutor(2) as pool:
        own, cpu, gpu = pool.map(run, [("CPU_ATTN", False), ("express", False), ("express", True)])
    assert cpu[:2] == own[:2]
    assert gpu == cpu
