"""Random models of a few thousand weights for the quality harness's tests."""

import torch

from bench.quality import harness


def tiny_llama(layers):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    harness.register()
    config = LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=6, num_key_value_heads=2, head_dim=16, max_position_embeddings=2048,
    )  # fmt: skip
    config._attn_implementation = harness.ATTENTION
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def tiny_gemma(layer_types, window):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    harness.register()
    config = Gemma3TextConfig(
        vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=len(layer_types),
        num_attention_heads=6, num_key_value_heads=2, head_dim=16, max_position_embeddings=2048,
        layer_types=layer_types, sliding_window=window, query_pre_attn_scalar=4,
    )  # fmt: skip
    config._attn_implementation = harness.ATTENTION
    return Gemma3ForCausalLM(config).eval().requires_grad_(False)
