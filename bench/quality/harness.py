"""A Hugging Face causal model whose attention runs through one cache per layer.

The hidden states are those of the model *with* the cache: every layer attends to what its own cache
holds, so errors compound over layers as they do in a server.  Layers with a sliding window keep
theirs, whatever the method: caches are made for the layers that grow.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from express_vllm.layers import GROWING, kinds

from .caches import WindowCache

ATTENTION = "express_quality"
#: Called with (layer, query, key, value, output) of every attention.
Watcher = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Heads:
    """What a cache must know of a model's attention, in the layers that grow."""

    layers: int
    query: int
    kv: int
    size: int
    scale: float
    rotary: Any  # module: (x, position ids) -> cos, sin
    config: Any

    @property
    def group(self) -> int:
        return self.query // self.kv


class LayerCache(Protocol):
    """One layer's cache of a batch of equally long sequences."""

    #: The most slots per KV head that were ever in use, book-keeping included.
    peak: int

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Process L further tokens: query [B, heads, L, d], key and value [B, KV heads, L, d],
        after RoPE -> outputs [B, heads, L, d]."""

    def fork(self) -> LayerCache:
        """A copy that goes its own way."""


_running: list[Stream] = []


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: [B, heads, L, d] -> ([B, L, heads, d], weights)."""
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"layer {module.layer_idx} has {name}, which the harness does not do")
    window = kwargs.get("sliding_window")
    output = _running[-1].attend(module.layer_idx, query, key, value, window)
    return output.transpose(1, 2), None


def load(path: str | Path, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """-> (model, tokenizer); the model runs only inside a `Stream`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    register()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=ATTENTION)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(path)


def register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)


def growing(config: Any) -> list[int]:
    """The layers of a model that see the whole text."""
    types = kinds(config, config.num_hidden_layers)
    return [layer for layer, kind in enumerate(types) if kind == GROWING]


def heads_of(model: Any) -> Heads:
    config = model.config
    layers = growing(config)
    attention, rotary = model.model.layers[layers[0]].self_attn, model.model.rotary_emb
    if len(layers) < config.num_hidden_layers:
        rotary = functools.partial(rotary, layer_type=GROWING)
    return Heads(
        len(layers), config.num_attention_heads, config.num_key_value_heads, attention.head_dim,
        attention.scaling, rotary, config,
    )  # fmt: skip


class Stream:
    """A batch of sequences on their way through the model."""

    def __init__(
        self, model: Any, caches: Sequence[LayerCache], watch: Watcher | None = None,
        tick: Callable[[], object] | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.caches = list(caches)
        self.windows: dict[int, LayerCache] = {}
        self._place = {layer: i for i, layer in enumerate(growing(model.config))}
        self.watch = watch
        self.tick = tick
        self.tokens = 0

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None = None
    ) -> Tensor:
        if window is not None:
            if layer not in self.windows:
                self.windows[layer] = WindowCache(heads_of(self.model), window, 0)
            return self.windows[layer].attend(query, key, value)
        place = self._place[layer]
        output = self.caches[place].attend(query, key, value)
        if self.watch:
            self.watch(place, query, key, value, output)
        if self.tick:
            self.tick()
        return output

    @torch.no_grad()
    def feed(self, ids: Tensor, chunk: int = 1 << 30) -> Tensor:
        """Process ids [B, L], in chunks -> the last hidden states [B, L, D]."""
        parts = []
        with _current(self):
            for part in ids.split(chunk, dim=1):
                stop = self.tokens + part.shape[1]
                positions = torch.arange(self.tokens, stop, device=part.device)[None]
                parts.append(
                    self.model.model(
                        input_ids=part,
                        position_ids=positions.expand(len(part), -1),
                        use_cache=False,
                    ).last_hidden_state
                )
                self.tokens = stop
        return torch.cat(parts, 1)

    def fork(self) -> Stream:
        twin = copy.copy(self)
        twin.caches = [cache.fork() for cache in self.caches]
        twin.windows = {layer: cache.fork() for layer, cache in self.windows.items()}
        return twin

    @property
    def peak(self) -> int:
        return max(cache.peak for cache in self.caches)


@contextmanager
def _current(stream: Stream) -> Iterator[None]:
    _running.append(stream)
    try:
        yield
    finally:
        _running.pop()


@torch.no_grad()
def log_probabilities(model: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [B, L, D], targets [B, L] -> (log-probability of each target in nats, fp32 [B, L];
    whether it was the likeliest token, bool [B, L])."""
    step = max(1, (1 << 28) // (model.config.vocab_size * len(hidden)))
    found, first = [], []
    for part, ids in zip(hidden.split(step, 1), targets.split(step, 1), strict=True):
        logits = model.lm_head(part).float()
        right = logits.gather(-1, ids[..., None])[..., 0]
        found.append(right - logits.logsumexp(-1))
        first.append(logits.argmax(-1) == ids)
    return torch.cat(found, 1), torch.cat(first, 1)
