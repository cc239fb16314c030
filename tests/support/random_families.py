"""Random small models of families whose layers are not all alike; written in seconds.

    python tests/support/random_families.py gemma3 /folder

The configuration is that of transformers; the tokenizer is the small model's.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from express_vllm import smallmodel

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
LINEAR = "linear_attention"
WINDOW = 64
#: More layers that grow than bounded ones: then vLLM gives the former two block tables.
MOSTLY_FULL = [SLIDING, FULL, FULL, SLIDING, FULL, FULL]
ONE_OF_THREE = [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL]

COMMON: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 8192,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
#: By name: the class of the configuration, and what is its own.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("Gemma3TextConfig", {
        "layer_types": MOSTLY_FULL, "sliding_window": WINDOW, "query_pre_attn_scalar": 16,
    }),
    "exaone4": ("Exaone4Config", {"layer_types": ONE_OF_THREE, "sliding_window": WINDOW}),
    "cohere2": ("Cohere2Config", {"layer_types": ONE_OF_THREE, "sliding_window": WINDOW}),
    "llama4": ("Llama4TextConfig", {
        "layer_types": [CHUNKED, CHUNKED, CHUNKED, FULL] * 2, "attention_chunk_size": WINDOW,
        "no_rope_layers": [1, 1, 1, 0] * 2, "num_local_experts": 2, "intermediate_size_mlp": 128,
        "attn_temperature_tuning": False,
    }),
    "qwen3_next": ("Qwen3NextConfig", {
        "layer_types": [LINEAR, LINEAR, LINEAR, FULL] * 2, "linear_key_head_dim": 64,
        "linear_value_head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    }),
    "granite4": ("GraniteMoeHybridConfig", {
        "layer_types": ["mamba", "mamba", "attention"] * 2, "num_local_experts": 0,
        "num_experts_per_tok": 0, "shared_intermediate_size": 128, "mamba_n_heads": 16,
        "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2,
        "hidden_size": 256,
        "position_embedding_type": "rope",
    }),
    "gemma2": ("Gemma2Config", {
        "layer_types": [SLIDING, FULL] * 3, "sliding_window": WINDOW, "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 20.0, "final_logit_softcapping": None,
        "tie_word_embeddings": True,
    }),
    "gpt_oss": ("GptOssConfig", {
        "layer_types": [SLIDING, FULL] * 3, "sliding_window": WINDOW, "num_local_experts": 2,
        "num_experts_per_tok": 1,
    }),
}  # fmt: skip


#: Of models for Triton's interpreter, without a tokenizer.
TINY: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 500, "max_position_embeddings": 2048,
    "initializer_range": 0.3,
}  # fmt: skip


def write_two_layers(folder: Path, config_class: str, **own: Any) -> str:
    """Write a TINY model with a configuration of this class, and `own` of it, to `folder`."""
    import transformers

    torch.manual_seed(3)
    config = getattr(transformers, config_class)(**TINY | own)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def write(folder: str | Path, family: str, seed: int = 0) -> Path:
    """Write config, weights and tokenizer of a family to `folder`."""
    import transformers

    name, own = FAMILIES[family]
    folder = Path(folder)
    layers = len(own["layer_types"])
    config = getattr(transformers, name)(**COMMON | {"num_hidden_layers": layers} | own)
    config.dtype = torch.float32
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    # Where the embedding is the last matrix too, a large one would repeat the last token.
    embedding = 0.1 if config.tie_word_embeddings else 1.0
    for key, tensor in model.state_dict().items():
        sharpen(key, tensor, embedding, generator)
    model.save_pretrained(folder)
    source = smallmodel.ensure()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, folder)
    return folder


def sharpen(name: str, tensor: torch.Tensor, embedding: float, generator: torch.Generator) -> None:
    """Random weights with which what attention finds decides the next token: a matrix keeps the
    standard deviation of what it maps; queries and attention's outputs are larger."""
    if tensor.ndim < 2:
        return
    deviation = embedding if "embed" in name else tensor.shape[-1] ** -0.5
    gain = next((g for part, g in (("q_proj", 3.0), ("o_proj", 4.0)) if part in name), 1.0)
    tensor.normal_(0, deviation * gain, generator=generator)


if __name__ == "__main__":
    print(write(sys.argv[2], sys.argv[1]))
