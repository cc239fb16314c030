"""What does not work together with express: one table, refused at start-up, printed by doctor.

docs/conflicts.md is `express-vllm conflicts > docs/conflicts.md`, a test keeps them equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .device import uses_triton
from .layers import ModelLayers, UnknownLayers
from .plugin import SUPPORTED_VLLM
from .shape import MAX_TOKENS

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


def _other_cache_dtype(config: Any) -> bool:
    """Whether keys and values would be stored in another type than the model computes in."""
    stored = config.cache_config.cache_dtype
    if stored == "auto":  # a checkpoint may ask for a quantized cache as its layers are made
        return getattr(config.quant_config, "kv_cache_scheme", None) is not None
    return str(config.model_config.dtype) != f"torch.{stored}"


def _own_classes(config: Any) -> bool:
    """Whether a worker, scheduler or executor runs that express did not choose.

    Subclasses of express's worker pass; so do its own names, when vLLM checks a configuration anew.
    """
    parallel, scheduler = config.parallel_config, config.scheduler_config.scheduler_cls
    return (
        not _is_express_worker(parallel.worker_cls)
        or not (scheduler is None or str(scheduler).startswith(f"{OURS}scheduler."))
        or parallel.distributed_executor_backend not in EXECUTORS
    )


def _is_express_worker(name: Any) -> bool:
    if name == "auto" or str(name).startswith(f"{OURS}backend."):
        return True
    if not isinstance(name, str):  # a class that was pickled by `LLM(worker_cls=...)`
        return False
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from express_vllm.backend.worker import BudgetsMixin

    return issubclass(resolve_obj_by_qualname(name), BudgetsMixin)


def _other_runner(config: Any) -> bool:
    return bool(config.use_v2_model_runner) != uses_triton()


def _ray_past_workers(config: Any) -> bool:
    """Whether vLLM's older Ray executor runs, which is chosen by an environment variable alone."""
    from vllm import envs

    backend = config.parallel_config.distributed_executor_backend
    return backend == "ray" and not envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND


def _batch_invariant(config: Any) -> bool:
    from vllm import envs

    return envs.VLLM_BATCH_INVARIANT


def _restarts(config: Any) -> bool:
    parallel = config.parallel_config
    return (
        config.model_config.enable_sleep_mode
        or parallel.enable_elastic_ep
        or parallel.enable_fault_tolerance
    )


def _parallel(name: str) -> Callable[[Any], bool]:
    return lambda config: getattr(config.parallel_config, name) > 1


def _model(name: str) -> Callable[[Any], bool]:
    return lambda config: bool(getattr(config.model_config, name))


def _layers(config: Any) -> ModelLayers | None:
    try:
        return ModelLayers.of(config.model_config)
    except UnknownLayers:
        return None


def _nothing_grows(config: Any) -> bool:
    layers = _layers(config)
    return layers is not None and not layers.growing


#: Where classes of this project come from, and vLLM's own executors.
OURS = "express_vllm."
EXECUTORS = (None, "mp", "uni", "ray", "external_launcher")

CONFLICTS = (
    Conflict(
        "a KV cache of another type than the model's", _other_cache_dtype,
        "halving and the kernels read keys and values as the model computes them, 16 or 32 bits",
        "drop --kv-cache-dtype or give the model's own type, such as --kv-cache-dtype bfloat16: "
        "that overrides a checkpoint that asks for a quantized cache, which auto follows",
    ),
    Conflict(
        "KV connectors, encoder-cache transfer",
        lambda c: c.kv_transfer_config is not None or c.ec_transfer_config is not None,
        "connectors move blocks by token position, a thinned cache has no such positions; "
        "encoder-cache transfer was not tried",
        "drop --kv-transfer-config, --ec-transfer-config",
    ),
    Conflict(
        "KV offloading", lambda c: bool(c.cache_config.kv_offloading_size),
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
        "dual-batch overlap", lambda c: bool(c.parallel_config.use_ubatching),
        "it runs a batch in two halves, a step's plan is for all of it",
        "drop --enable-dbo, --ubatch-size",
    ),
    Conflict(
        "Ray's older executor", _ray_past_workers,
        "it runs the model without the worker, which hands over the budgets",
        "unset VLLM_USE_RAY_V2_EXECUTOR_BACKEND or set it to 1",
    ),
    Conflict(
        "a worker, scheduler or executor class of your own", _own_classes,
        "without express's own no request has a budget, and layers would write into other "
        "requests' blocks",
        "drop --worker-cls, --scheduler-cls and a class in --distributed-executor-backend",
    ),
    Conflict(
        "attention backends by kind of layer", lambda c: bool(c.attention_config.backend_per_kind),
        "a request's blocks are counted for layers that all run express",
        "drop backend_per_kind from --attention-config",
    ),
    Conflict(
        "KV-sharing fast prefill", lambda c: bool(c.cache_config.kv_sharing_fast_prefill),
        "it leaves out tokens of a chunk that compactions count",
        "drop --kv-sharing-fast-prefill",
    ),
    Conflict(
        "routed experts in answers",
        lambda c: bool(c.aux_output_config.enable_return_routed_experts),
        "they are kept by blocks that mean positions, which those of bounded requests do not",
        "drop --enable-return-routed-experts",
    ),
    Conflict(
        "batch invariance", _batch_invariant,
        "the kernels were not tried for it",
        "unset VLLM_BATCH_INVARIANT",
    ),
    Conflict(
        "sleep mode, elastic expert parallelism, fault tolerance", _restarts,
        "they take memory or workers away from under a running engine, which was not tried",
        "drop --enable-sleep-mode, --enable-elastic-ep, --enable-fault-tolerance",
    ),
    Conflict(
        f"sequences of more than {MAX_TOKENS:,} tokens",
        lambda c: c.model_config.max_model_len > MAX_TOKENS,
        "positions and the levels of a coreset are laid out for so many",
        f"give a --max-model-len of at most {MAX_TOKENS}",
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
        "attention-free models", _model("is_attention_free"),
        "nothing in them grows with the text",
        "serve this model with another backend",
    ),
    Conflict(
        "layers of a kind that express does not know", lambda c: _layers(c) is None,
        "the model's layer_types name others than full attention, sliding windows, chunked "
        "attention and linear attention or state-space layers",
        "serve this model with another backend",
    ),
    Conflict(
        "models without a layer that grows", _nothing_grows,
        "windows or states bound every layer, there is nothing to thin",
        "serve this model with another backend",
    ),
    Conflict(
        "KV sharing between layers",
        lambda c: bool(getattr(c.model_config.hf_text_config, "num_kv_shared_layers", 0)),
        "a layer's queries would score another layer's heavy hitters",
        "serve this model with another backend",
    ),
    Conflict(
        "diffusion models",
        lambda c: c.diffusion_config is not None or c.model_config.is_diffusion,
        "they fill in tokens in any order, by a scheduler of their own",
        "serve this model with another backend",
    ),
    Conflict(
        "pooling models", lambda c: c.model_config.runner_type == "pooling",
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
        "KV events",
        lambda c: c.kv_events_config is not None and c.kv_events_config.enable_kv_cache_events,
        "block events describe blocks that mean positions; those of bounded requests do not",
        "drop --kv-events-config",
    ),
)  # fmt: skip

#: What a model's attention layers may not have (checked by the backend as they are built, and as
#: they ask for their cache).  Whatever is active and neither known nor here is "not built".
LAYER_CONFLICTS = {
    "sliding-window and chunked-local layers": "vLLM's own backends run them, here express was to",
    "prefix-LM and other layers that are not causal": "halving follows the order of the tokens",
    "attention sinks of the model": "learned keys and values before those of the tokens are not in "
    "the cache; learned logits are fine",
    "MLA and sparse attention layers": "they cache no keys and values per token",
    "multimodal prefix attention": "it is bidirectional over the prefix",
    "cross and encoder attention": "it is not causal self-attention",
    "ALiBi slopes": "they need every token's position, halving mixes them",
    "KV sharing between layers": "a layer's queries would score another layer's heavy hitters",
    "values of another size than keys": "a slot holds a key and a value of one size",
    "layers that a model runs on another backend": "a request's blocks are counted for the layers "
    "that grow, by the model's configuration",
    "a KV cache of another type than the model's": "give the model's own as --kv-cache-dtype",
    "on GPUs, a head size that is no multiple of 8 or is above 256": "the Triton kernels read rows "
    "in pieces of 16 bytes and hold a whole one; on CPUs every size works",
    "on GPUs, scales or soft caps that differ between layers": "one launch chooses the "
    "heavy hitters of all layers",
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


def refuse_unprepared(vllm_config: VllmConfig) -> None:
    """Raise ConflictError if a layer got express though the server was not started with it."""
    scheduler = vllm_config.scheduler_config.scheduler_cls
    if not str(scheduler).startswith(f"{OURS}scheduler."):
        raise ConflictError(
            f"a layer is to run express under the scheduler {scheduler}, which knows no budgets: "
            "choose it for the whole server, by --attention-backend express"
        )


def active(
    values: Mapping[str, Any], defaults: Mapping[str, Any], names: Mapping[str, str]
) -> Iterator[str]:
    """What is on of `values`: those that differ from vLLM's `defaults`, by their name in
    LAYER_CONFLICTS or, if they have none in `names`, by their own."""
    for field, value in values.items():
        plain = isinstance(value, int | float | str)  # others, such as tensors, have no truth
        if not (value is None or value is False or (plain and value == defaults.get(field))):
            yield names.get(field, f"{field}={value!r}")


def refuse_layer(found: Iterable[str]) -> None:
    """Raise ConflictError if a layer of the model has any of the `found` LAYER_CONFLICTS."""
    lines = [
        f"  - {name}: {LAYER_CONFLICTS.get(name, 'not built')}" for name in dict.fromkeys(found)
    ]
    if lines:
        raise ConflictError(
            "--attention-backend express cannot run this model, which has:\n"
            + "\n".join(lines)
            + "\nServe it with another --attention-backend."
        )


NOTES = """## What works

Tested: chunked prefill, preemption, abort, streaming, mixed budgets and exact requests in one
batch. Caches of the model's own type work in float32, bfloat16 and float16, and odd head sizes work
on CPUs. Tensor, pipeline and data parallelism work, too
([operations.md](operations.md#more-than-one-gpu)).
On GPUs all this was tried on one and on two NVIDIA H100s and H200s.

Tested on CPUs and on GPUs: structured output. Tested on CPUs, and not tried on GPUs yet: LoRA.

## When vLLM does not know `express`

«Unknown attention backend: 'EXPRESS'» means that vLLM did not load the plugin. A line before it,
`express: --attention-backend express is off: ...`, says why:

- vLLM is not VERSION.*;
- vLLM chose another platform because `VLLM_TARGET_DEVICE` is set, which leaves out every plugin's
  platform;
- the device is neither a CPU nor NVIDIA's.

Without that line, `VLLM_PLUGINS` is set and does not name `express`: nothing of it was loaded that
could say so. `express-vllm doctor` tells these cases apart.

## Faults of vLLM itself

These are of vLLM VERSION on CPUs.
"""
#: What a request meets: in vLLM alone, with express.
VLLM_FAULTS = (
    (
        "a `seed` and a prompt of more than one chunk (2,048 tokens)",
        "the engine ends: «CPU Generator does not use offset»",
        "works, the same tokens whatever the chunks",
    ),
    (
        "LoRA beside requests without an adapter",
        "they get another request's adapter "
        "([its repair](https://github.com/vllm-project/vllm/pull/48421) is not in it)",
        "the same: serve the bare model by a server of its own "
        "(`pytest -m slow tests/engine/test_lora.py`)",
    ),
    (
        'a JSON schema that only refers to itself, `{"$ref": "#"}`',
        "not tried",
        "500 for this request",
    ),
    (
        "structured output beside `allowed_token_ids` that its grammar never allows",
        "not tried",
        "500 for this request",
    ),
)
TRIED = "[verification.md](verification.md#odd-requests) says which odd requests were tried."


def matrix() -> str:
    """The conflict matrix as Markdown."""
    lines = [
        "# What does not work together with express",
        "",
        "Each of these features stops the server at start-up, with its reason. Nothing falls back",
        "silently.",
        "This page is printed by `express-vllm conflicts` from the table that does the refusing.",
        "",
        "| feature | why | what to do |",
        "| --- | --- | --- |",
        *[f"| {c.feature} | {c.reason} | {c.remedy} |" for c in CONFLICTS],
        "",
        "## Layers of a model",
        "",
        "A model is refused if one of its attention layers has one of these:",
        "",
        "| feature | why |",
        "| --- | --- |",
        *[f"| {name} | {reason} |" for name, reason in LAYER_CONFLICTS.items()],
        "",
        NOTES.replace("VERSION", SUPPORTED_VLLM),
        "| request | vLLM alone | with express |",
        "| --- | --- | --- |",
        *["| " + " | ".join(row) + " |" for row in VLLM_FAULTS],
        "",
        TRIED,
    ]
    return "\n".join(lines) + "\n"
