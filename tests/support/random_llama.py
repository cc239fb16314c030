"""A random Llama for tests that are not about a model; 8 KV heads divide among 2, 4 and 8 ranks.

    python tests/support/random_llama.py /folder

Seeded; about 30 MB, written in a second.  The tokenizer is that of the small model.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from express_vllm import smallmodel

HIDDEN, MLP, HEAD_SIZE = 64, 128, 64
CONTEXT = 8192
#: Standard deviations: what a layer adds to a residual of 1; the logits of attention and of the
#: model.  Sharp enough that what attention finds decides the next token.
ATTENTION, FEED_FORWARD = 4.0, 1.0
SHARPNESS, LOGITS = 3.0, 3.0


@dataclass(frozen=True)
class Shape:
    layers: int = 4
    heads: int = 16
    kv_heads: int = 8


#: For several ranks, and for tests of one that are not about a model.
RANKS, QUICK = Shape(), Shape(layers=2, heads=4, kv_heads=2)


def write(folder: str | Path, shape: Shape = RANKS, seed: int = 0) -> Path:
    """Write config, weights and tokenizer to `folder`, which may exist."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source = smallmodel.ensure()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / name).exists():
            shutil.copy(source / name, folder)
    borrowed = json.loads((source / "config.json").read_text())
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": HEAD_SIZE,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"},
        "tie_word_embeddings": False,
        "dtype": "float32",
        **{name: borrowed[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = weights(config["vocab_size"], shape, seed)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def weights(vocabulary: int, shape: Shape, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, deviation: float) -> torch.Tensor:
        """Maps a vector of standard deviation 1 to one of `deviation`."""
        return torch.randn(rows, columns, generator=generator) * deviation / columns**0.5

    tensors = {
        "model.embed_tokens.weight": torch.randn(vocabulary, HIDDEN, generator=generator),
        "model.norm.weight": torch.ones(HIDDEN),
        # Not the embedding, which would repeat the last token.
        "lm_head.weight": matrix(vocabulary, HIDDEN, LOGITS),
    }
    for layer in range(shape.layers):
        part = {
            "self_attn.q_proj": matrix(shape.heads * HEAD_SIZE, HIDDEN, SHARPNESS),
            "self_attn.k_proj": matrix(shape.kv_heads * HEAD_SIZE, HIDDEN, 1.0),
            "self_attn.v_proj": matrix(shape.kv_heads * HEAD_SIZE, HIDDEN, 1.0),
            "self_attn.o_proj": matrix(HIDDEN, shape.heads * HEAD_SIZE, ATTENTION),
            "mlp.gate_proj": matrix(MLP, HIDDEN, 1.0),
            "mlp.up_proj": matrix(MLP, HIDDEN, 1.0),
            "mlp.down_proj": matrix(HIDDEN, MLP, FEED_FORWARD),
            "input_layernorm": torch.ones(HIDDEN),
            "post_attention_layernorm": torch.ones(HIDDEN),
        }
        tensors |= {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in part.items()}
    return tensors


if __name__ == "__main__":
    print(write(sys.argv[1]))
