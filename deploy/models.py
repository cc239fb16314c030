"""Which of vLLM's models express serves: docs/models.md, from a walk over vLLM's registry.

    .venv/bin/python deploy/models.py > docs/models.md     # a test keeps the page equal

What a model's layers may have is read from vLLM's source of it, what was tried from TESTED.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from express_vllm.plugin import SUPPORTED_VLLM

#: What to look for in the source of a model, in this order.
BESIDE = {
    "sliding windows": r"sliding_window",
    "chunked attention": r"ChunkedLocalAttention",
    "states": r"\bIsHybrid\b",
    "learned sinks": r"\bsinks\s*=",
    "soft caps": r"logits_soft_cap\s*=",
}
REFUSED = {
    "MLA": r"MLAAttention|MultiHeadLatentAttention|MLAModules",
    "ALiBi": r"alibi_slopes\s*=",
    "KV sharing": r"kv_sharing_target_layer_name\s*=",
    "values of another size than keys": r"head_size_v\s*=",
}
#: Of models whose layers always have it.
ALWAYS = {
    "mamba": "nothing grows with the text", "mamba2": "nothing grows with the text",
    "bloom": "ALiBi", "step1": "ALiBi", "mimo_v2": "values of another size than keys",
    "falcon_h1": "attention and a state in one layer",
    "zamba2": "attention layers that share weights, not tried",
    "hrm_text": "attention over a prefix that is not causal",
}  # fmt: skip
#: What was run, by the module of the model.
TESTED = {
    "llama": "SmolLM2-135M and random weights, CPU and GPU",
    "gemma2": "random weights, CPU", "gpt_oss": "random weights, CPU",
    "gemma3": "Gemma 3 270M and random weights, CPU",
    "exaone4": "random weights, CPU", "commandr": "Cohere2, random weights, CPU",
    "llama4": "random weights, CPU", "granitemoehybrid": "random weights, CPU",
    "qwen3_next": "random weights, CPU",
}  # fmt: skip
#: Modules of vLLM's models that are no models.
COMMON = {"interfaces", "interfaces_base", "utils", "adapters", "vision", "module_mapping"}


def models() -> dict[str, list[str]]:
    """Modules of vLLM's text-generation models -> the architectures that they implement."""
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

    found: dict[str, list[str]] = {}
    for architecture, (module, *_) in _TEXT_GENERATION_MODELS.items():
        found.setdefault(module, []).append(architecture)
    return found


@cache
def root() -> Path:
    spec = find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def source(module: str) -> str:
    """The text of a model's module and of the models that it is made from."""
    if module.startswith("vllm."):
        folder = root().joinpath(*module.split(".")[1:])
        return "\n".join(path.read_text() for path in sorted(folder.rglob("*.py")))
    text = (root() / "model_executor" / "models" / f"{module}.py").read_text()
    for other in re.findall(r"^from (?:\.|vllm\.model_executor\.models\.)(\w+) import", text, re.M):
        path = root() / "model_executor" / "models" / f"{other}.py"
        if other not in COMMON and path.exists():
            text += path.read_text()
    return text


def having(text: str, patterns: dict[str, str]) -> list[str]:
    return [name for name, pattern in patterns.items() if re.search(pattern, text, re.M)]


def verdict(module: str, text: str) -> str:
    if module in ALWAYS:
        return f"refused: {ALWAYS[module]}"
    refused = having(text, REFUSED)
    if module.startswith("vllm.") or ("MLA" in refused and not re.search(r"\bAttention\(", text)):
        return "refused: MLA" if "MLA" in refused else "refused: not tried"
    unless = f"; refused where a checkpoint has {' or '.join(refused)}" if refused else ""
    if tried := TESTED.get(module):
        return f"tested ({tried}){unless}"
    return f"expected{unless}"


HEAD = f"""# Models

The text-generation models that vLLM {SUPPORTED_VLLM} lists, by the module that implements them.
This page is printed by `deploy/models.py`. What a model's layers may have is read from vLLM's
sources; a checkpoint need not use it. *Expected* means that nothing in them is refused, and that
nobody has tried.

Layers with a sliding window, a chunk or a state stay vLLM's own
([how](budgets.md#models-with-bounded-layers)). Express thins the others.
What is refused ends the start with its reason ([conflicts](conflicts.md#layers-of-a-model)).

| module | architectures | beside plain attention | with express |
| --- | --- | --- | --- |
"""


def page() -> str:
    rows = []
    for module, architectures in sorted(models().items(), key=lambda x: x[0].split(".")[-1]):
        text = source(module)
        beside = ", ".join(having(text, BESIDE)) or "nothing"
        names = ", ".join(f"`{name}`" for name in sorted(architectures))
        rows.append(f"| {module.split('.')[-1]} | {names} | {beside} | {verdict(module, text)} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    print(page(), end="")
