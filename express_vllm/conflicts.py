"""What does not work together with express: one table, refused at start-up, printed by doctor.

docs/conflicts.md is `express-vllm conflicts > docs/conflicts.md`, a test keeps them equal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class ConflictError(ValueError):
    """The configuration cannot run with `--attention-backend express`."""


@dataclass(frozen=True)
class Conflict:
    """A feature, how to see that it is on, why it is refused and what to change."""

    feature: str
    active: Callable[[Any], bool]
    reason: str
    remedy: str


def _explicit_prefix_caching(config: Any) -> bool:
    # vLLM turns prefix caching on by default and keeps no trace of who asked for it.
    return bool({"--enable-prefix-caching", "--enable_prefix_caching"} & set(sys.argv))


def _quantized_cache(config: Any) -> bool:
    return config.cache_config.cache_dtype not in ("auto", "bfloat16", "float16", "float32")


def _other_runner(config: Any) -> bool:
    from express_vllm.backend.attention import uses_triton

    return bool(config.use_v2_model_runner) != uses_triton()


def _ray_past_workers(config: Any) -> bool:
    """Whether vLLM's older Ray executor runs, which is chosen by an environment variable alone."""
    from vllm import envs

    backend = getattr(config.parallel_config, "distributed_executor_backend", None)
    return backend == "ray" and not envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND


def _parallel(name: str) -> Callable[[Any], bool]:
    return lambda config: getattr(config.parallel_config, name, 1) > 1


def _model(name: str) -> Callable[[Any], bool]:
    return lambda config: bool(getattr(config.model_config, name, False))


CONFLICTS = (
    Conflict(
        "prefix caching", _explicit_prefix_caching,
        "a thinned cache depends on the whole sequence, its blocks cannot be shared",
        "drop --enable-prefix-caching (it is off by default with express)",
    ),
    Conflict(
        "quantized KV cache", _quantized_cache,
        "halving and the kernels read 16- or 32-bit keys and values",
        "drop --kv-cache-dtype or set it to auto",
    ),
    Conflict(
        "KV connectors", lambda c: c.kv_transfer_config is not None,
        "connectors move blocks by token position, a thinned cache has no such positions",
        "drop --kv-transfer-config",
    ),
    Conflict(
        "KV offloading", lambda c: bool(getattr(c.cache_config, "kv_offloading_size", None)),
        "offloading moves blocks by token position",
        "drop --kv-offloading-size",
    ),
    Conflict(
        "speculative decoding", lambda c: c.speculative_config is not None,
        "rejected draft tokens cannot be taken out of a compacted cache",
        "drop --speculative-config",
    ),
    Conflict(
        "decode context parallelism", _parallel("decode_context_parallel_size"),
        "it spreads one sequence's tokens over ranks, a coreset is kept per sequence",
        "drop --decode-context-parallel-size",
    ),
    Conflict(
        "prefill context parallelism", _parallel("prefill_context_parallel_size"),
        "it spreads one sequence's tokens over ranks, a coreset is kept per sequence",
        "drop --prefill-context-parallel-size",
    ),
    Conflict(
        "Ray's older executor", _ray_past_workers,
        "it runs the model without the worker, which hands over the budgets",
        "unset VLLM_USE_RAY_V2_EXECUTOR_BACKEND or set it to 1",
    ),
    Conflict(
        "MLA models", _model("use_mla"),
        "MLA caches one latent vector per token, the coreset is built for keys and values",
        "serve this model with another backend",
    ),
    Conflict(
        "encoder-decoder models", _model("is_encoder_decoder"),
        "cross attention reads a fixed encoder cache",
        "serve this model with another backend",
    ),
    Conflict(
        "attention-free and hybrid state models",
        lambda c: bool(getattr(c.model_config, "is_hybrid", False))
        or bool(getattr(c.model_config, "is_attention_free", False)),
        "their state is already bounded and shares the block pool in ways not built yet",
        "serve this model with another backend",
    ),
    Conflict(
        "pooling models", lambda c: getattr(c.model_config, "runner_type", "") == "pooling",
        "they do not decode",
        "serve this model with another backend",
    ),
    Conflict(
        "Model Runner V2 on CPUs, V1 on GPUs", _other_runner,
        "the CPU path reads the batch order of Model Runner V1, the GPU path that of V2",
        "unset VLLM_USE_V2_MODEL_RUNNER or set it to 0 on a CPU, to 1 on a GPU; if it is not set, "
        "drop the feature that made vLLM choose the other one (its log names it)",
    ),
    Conflict(
        "KV events", lambda c: bool(getattr(c.kv_events_config, "enable_kv_cache_events", False)),
        "block events describe prefix-cacheable blocks, express has none",
        "drop --kv-events-config",
    ),
)  # fmt: skip

#: What a model's attention layers may not have (checked by the backend as they are built).
LAYER_CONFLICTS = {
    "sliding-window and chunked-local layers": "they are already bounded and not mixed in yet",
    "attention sinks of the model": "a learned sink logit is not in the kernels",
    "sparse attention layers": "they cache no keys and values per token",
    "multimodal prefix attention": "it is bidirectional over the prefix",
    "cross and encoder attention": "it is not causal self-attention",
    "ALiBi slopes": "they need every token's position, halving mixes them",
    "logits soft caps": "they are not in the kernels",
    "KV sharing between layers": "a layer's queries would score another layer's heavy hitters",
}


def find_conflicts(vllm_config: VllmConfig) -> list[Conflict]:
    if vllm_config.model_config is None:
        return []
    return [conflict for conflict in CONFLICTS if conflict.active(vllm_config)]


def refuse_conflicts(vllm_config: VllmConfig) -> None:
    """Raise ConflictError naming every conflict, its reason and the flag to change."""
    found = find_conflicts(vllm_config)
    if not found:
        return
    lines = [f"  - {c.feature}: {c.reason}. {c.remedy}." for c in found]
    raise ConflictError("--attention-backend express cannot run with:\n" + "\n".join(lines))


def refuse_layer(found: Iterable[str]) -> None:
    """Raise ConflictError if a layer of the model has any of the `found` LAYER_CONFLICTS."""
    lines = [f"  - {name}: {LAYER_CONFLICTS.get(name, 'not built')}" for name in found]
    if lines:
        raise ConflictError(
            "--attention-backend express cannot run this model, which has:\n"
            + "\n".join(lines)
            + "\nServe it with another --attention-backend."
        )


def matrix() -> str:
    """The conflict matrix as Markdown."""
    lines = [
        "# What does not work together with express",
        "",
        "Each of these stops the server at start-up with its reason; nothing falls back silently.",
        "This page is printed by `express-vllm conflicts` from the table that does the refusing.",
        "",
        "| feature | why | what to do |",
        "| --- | --- | --- |",
        *[f"| {c.feature} | {c.reason} | {c.remedy} |" for c in CONFLICTS],
        "",
        "A model is refused if one of its attention layers has:",
        "",
        "| feature | why |",
        "| --- | --- |",
        *[f"| {name} | {reason} |" for name, reason in LAYER_CONFLICTS.items()],
        "",
        "Works, and is tested: chunked prefill, preemption, abort, streaming, mixed budgets and",
        "exact requests in one batch, float32, bfloat16 and float16 caches; tensor, pipeline and",
        "data parallelism ([operations.md](operations.md#more-than-one-gpu)).",
        "On NVIDIA GPUs this was tried on one and on two H100s and H200s.",
        "",
        "Tested on CPUs, not tried on GPUs yet: structured output; LoRA. On a CPU vLLM 0.32 adds",
        "another request's adapter to a request without one in the same batch, under any backend",
        "([its repair](https://github.com/vllm-project/vllm/pull/48421) is not in 0.32): serve the",
        "bare model by a server of its own there (`pytest -m slow tests/test_lora.py`).",
    ]
    return "\n".join(lines) + "\n"
