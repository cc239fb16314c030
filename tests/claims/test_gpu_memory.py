"""An engine that may use 95% of a GPU runs the worst mix of budgets within what it reserved."""

from __future__ import annotations

import json

import pytest
from engines import run_engine

pytestmark = pytest.mark.gpu
TOKENS, LENGTH, VOCABULARY = 32_768, 131_072, 1024


@pytest.fixture(scope="module")
def shapes_only(tmp_path_factory):
    """Two layers of an 8B model's attention; weights are made up by vLLM."""
    folder = tmp_path_factory.mktemp("shapes")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512,
        "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "max_position_embeddings": LENGTH, "vocab_size": VOCABULARY, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def job(length, memory, tokens=24):
    return {
        "prompt": [(7 * i + length) % VOCABULARY for i in range(length)], "max_tokens": tokens,
        "extra_args": {"express_memory_tokens": memory},
    }  # fmt: skip


@pytest.mark.parametrize("wide", [[], [1]])
def test_the_worst_mix_stays_within_what_was_profiled(tmp_path, shapes_only, wide):
    mix = [job(120_000, 100_000), job(60_000, 50_000), job(60_000, 30_001)]
    mix += [job(20_000 + 100 * i, 10_000 + 700 * i) for i in range(8)]
    mix += [job(3_000 + 100 * i, 128 + 61 * i) for i in range(24)]
    calls = []
    for tokens in (TOKENS, 5_000):
        calls.append(("generate", {"requests": mix, "max_batched_tokens": tokens}))
        calls.append(("generate", {"requests": mix[::-1], "max_batched_tokens": tokens}))
    results = run_engine(
        tmp_path, "express", [*calls, ("device_memory", {})], model=shapes_only,
        dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True, block_size=16,
        max_model_len=LENGTH, max_num_batched_tokens=TOKENS, max_num_seqs=64,
        gpu_memory_utilization=0.95, num_gpu_blocks_override=None, kv_cache_memory_bytes=None,
        additional_config={"express": {"wide_layers": wide, "wide_factor": 2}},
    )  # fmt: skip
    memory = results[-1]
    print({name: f"{size / 2**30:.2f} GiB" for name, size in memory.items()})
    assert all(result["leaked"] == 0 for result in results[:-1])
    assert memory["peak"] - memory["started"] <= memory["profiled"]


def test_chunks_are_timed(tmp_path):
    """A prompt's events alone: none of its decodes reaches one."""
    (result,) = run_engine(
        tmp_path, "express", [("compaction_seconds", {"length": 3000, "max_tokens": 8})]
    )
    print(result)
    assert 0 < result["seconds"] < 60
