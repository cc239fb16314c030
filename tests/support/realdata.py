"""Queries, keys and values of the small model on real text, computed once and cached."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import torch

from express_vllm import smallmodel

LAYERS = (0, 4, 9, 14, 19, 24, 29)
TOKENS = 4096


def load() -> dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Layer -> (queries [T, heads, d], keys [T, KV heads, d], values), after RoPE, in fp32.

    The text is the language reference that ships with Python (`pydoc_data.topics`).
    """
    model = smallmodel.ensure()
    path = Path(model).parent / f"qkv-{TOKENS}-{torch.__version__}.pt"
    if not path.exists():
        torch.save(_compute(model), path)
    return {k: tuple(x.float() for x in v) for k, v in torch.load(path).items()}


def text() -> str:
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in ("compound", "types", "formatstrings", "import"))


def _compute(model_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float32, attn_implementation="sdpa"
    )
    ids = torch.tensor([tokenizer(text())["input_ids"][:TOKENS]])
    assert ids.shape[1] == TOKENS
    seen: dict[int, tuple[torch.Tensor, ...]] = {}
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def record(module, query, key, value, *args, **kwargs):
        if module.layer_idx in LAYERS:
            rows = (x[0].transpose(0, 1).to(torch.bfloat16) for x in (query, key, value))
            seen[module.layer_idx] = tuple(rows)
        return original(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = record
    try:
        with torch.no_grad():
            model.model(ids)
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = original
    return seen
