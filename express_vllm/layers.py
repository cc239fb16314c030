"""`ModelLayers`: which layers of a model grow with a sequence, and what the others hold.

Express thins the layers that grow.  Those that are bounded by themselves (a sliding window, a chunk
of local attention, a state of fixed size) keep vLLM's own backend, cache and block manager.  Which
they are is read from the model's configuration, since budgets are decided where no model is loaded;
workers compare it with the layers that they have built (scheduler/spec.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ModelConfig

#: Names in `layer_types` of a Hugging Face configuration: plain attention; windows -> where their
#: size stands; states of fixed size; what holds nothing.
GROWING = "full_attention"
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
STATES = ("linear_attention", "mamba", "mamba2", "conv")
EMPTY = ("mlp", "moe")
#: Older names, and what `layers_block_type` calls them.
OLDER = {"attention": GROWING}


class UnknownLayers(ValueError):
    """The configuration names layers that express cannot stand beside."""


@dataclass(frozen=True)
class Bounded:
    """`layers` layers each of whose tokens attends to at most the last `window`, or, without one,
    that hold a state of fixed size, which takes a block."""

    layers: int
    window: int | None

    def blocks(self, stored: int, block_size: int) -> int:
        """Blocks of a layer for a sequence of `stored` tokens: a window may begin inside one."""
        if self.window is None:
            return 1
        return min(-(-stored // block_size), -(-(self.window - 1) // block_size) + 1)


@dataclass(frozen=True)
class ModelLayers:
    """Indices of the layers that grow, among all of a model's, and the bounded ones by size."""

    growing: tuple[int, ...]
    bounded: tuple[Bounded, ...] = ()

    @property
    def group_size(self) -> int:
        """Layers that share a block of the pool.

        vLLM gives every group of layers a block table, makes groups of equal size so that they take
        blocks of one pool, and takes as size the rarest kind of layer (the commonest, if there are
        hardly more of it).  `_get_kv_cache_groups_uniform_page_size`; a test compares.
        """
        counts = [len(self.growing), *(kind.layers for kind in self.bounded)]
        return max(counts) if max(counts) < 1.5 * min(counts) else min(counts)

    @property
    def groups(self) -> int:
        """Block tables of the layers that grow."""
        return -(-len(self.growing) // self.group_size)

    @property
    def states(self) -> bool:
        """Whether some layers hold a state of fixed size."""
        return any(kind.window is None for kind in self.bounded)

    def bounded_blocks(self, stored: int, block_size: int) -> int:
        """Blocks that the bounded layers hold of a sequence."""
        return sum(
            -(-kind.layers // self.group_size) * kind.blocks(stored, block_size)
            for kind in self.bounded
        )

    @classmethod
    def equal(cls, layers: int) -> ModelLayers:
        """Of a model whose layers all grow."""
        return cls(tuple(range(layers)))

    @classmethod
    def of(cls, model: ModelConfig) -> ModelLayers:
        """Read from a model's configuration.

        Raises UnknownLayers if it has layers that are neither plain attention nor bounded.
        """
        config = model.hf_text_config
        types = kinds(config, model.get_total_num_hidden_layers())
        unknown = sorted(set(types) - {GROWING, *WINDOWS, *STATES, *EMPTY})
        if unknown:
            raise UnknownLayers(", ".join(unknown))
        growing = tuple(i for i, kind in enumerate(types) if kind == GROWING)
        return cls(growing, tuple(_bounded(types, config)))


def kinds(config: Any, layers: int) -> list[str]:
    """The kind of each of `layers` layers, of a Hugging Face text configuration; what a window
    without a size bounds grows."""
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    types = list(types or ["sliding_attention"] * layers)[:layers]  # prediction layers may follow
    off = {kind for kind, size in WINDOWS.items() if not getattr(config, size, None)}
    types = [OLDER.get(kind, kind) for kind in types]
    return [GROWING if kind in off else kind for kind in types]


def _bounded(types: Sequence[str], config: Any) -> Iterator[Bounded]:
    counts = Counter(types)
    for kind, size in WINDOWS.items():
        if kind in counts:
            yield Bounded(counts[kind], getattr(config, size))
    if states := sum(counts[kind] for kind in STATES):
        yield Bounded(states, None)
