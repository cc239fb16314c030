"""Random LoRA adapters."""

import json

import torch
from safetensors.torch import save_file

RANK = 8


def write_adapter(folder, config, *, scale, seed=0):
    """A random adapter of queries, keys and values in PEFT's format; scale 0 changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    hidden = config.hidden_size
    size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    keys = config.num_key_value_heads * size
    sizes = {"q_proj": config.num_attention_heads * size, "k_proj": keys, "v_proj": keys}
    weights = {}
    for layer in range(config.num_hidden_layers):
        for name, size in sizes.items():
            path = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            down = torch.randn(RANK, hidden, generator=generator) * hidden**-0.5
            weights[f"{path}.lora_A.weight"] = down
            weights[f"{path}.lora_B.weight"] = torch.randn(size, RANK, generator=generator) * scale
    folder.mkdir()
    description = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none",
                   "task_type": "CAUSAL_LM", "target_modules": list(sizes)}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(description))
    save_file(weights, folder / "adapter_model.safetensors")
    return str(folder)
