"""Device memory that an engine's layers and steps share: counted before the cache gets the rest."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from express_vllm.settings import Settings
from express_vllm.shape import Shape

from ..kernels.decode import DecodeScratch
from ..kernels.memory import Workspace
from ..kernels.scratch import Side, table_bytes, workspace_bytes


class Limits(NamedTuple):
    """The most that a request and a step may ask for."""

    slots: int  # live slots of a request in a layer, wide ones included
    tokens: int  # of a step
    requests: int
    shapes: tuple[Shape, ...]  # of the largest budget, in ordinary and in wide layers

    @classmethod
    def of(cls, vllm_config: Any) -> Limits:
        scheduler = vllm_config.scheduler_config
        settings = Settings.of(vllm_config)
        config, most = settings.config, settings.most_slots
        factors = [1, config.wide_factor] if config.wide_layers else [1]
        try:
            shapes = [config.shape(most * factor, config.profile) for factor in factors]
        except ValueError:  # too few tokens for any event
            shapes = []
        return cls(
            min(most * factors[-1], settings.max_model_len), scheduler.max_num_batched_tokens,
            scheduler.max_num_seqs, tuple(shapes),
        )  # fmt: skip


class EngineMemory:
    """Scratch of decodes and of plans.  Every layer of an engine holds it, so it dies with them."""

    def __init__(self, vllm_config: Any) -> None:
        self._vllm_config = vllm_config  # while this lives, no other config has its id
        self._decode: dict[tuple[int, int], DecodeScratch] = {}
        self._ballast: Tensor | None = None
        self._tables = 0
        self.limits = Limits.of(vllm_config)
        self.device = torch.get_default_device()
        self.workspace = Workspace(0, self.device)

    @classmethod
    def of(cls, vllm_config: Any) -> EngineMemory:
        """The one of this engine."""
        found = _ENGINES.get(id(vllm_config))
        if found is None:
            found = _ENGINES[id(vllm_config)] = cls(vllm_config)
        return found

    @property
    def limit(self) -> int:
        """Bytes of scratch that a plan may take."""
        return self.workspace.size

    def decode_scratch(self, heads: int, size: int) -> DecodeScratch:
        """Of layers with such heads: they run one after the other."""
        found = self._decode.get((heads, size))
        if found is None:
            limits = self.limits
            found = DecodeScratch(limits.requests, heads, size, limits.slots, self.device)
            self._decode[heads, size] = found
        return found

    def make_room(self, side: Side) -> None:
        """See to it that the plans of a layer have room."""
        limits = self.limits
        largest = limits.shapes[-1] if limits.shapes else None
        self.workspace.grow(workspace_bytes(limits.slots, limits.tokens, largest, side))
        self._tables = sum(
            table_bytes(min(shape.slots, limits.slots), limits.tokens, shape)
            for shape in limits.shapes
        )

    def reserve(self) -> None:
        """Take the memory, while the engine measures how much is left for the cache.

        Tables of a step live during the whole forward pass, so their share is held, too, until the
        first step needs it (`begin`).
        """
        _ = self.workspace.buffer
        if self._ballast is None:
            self._ballast = torch.empty(self._tables, dtype=torch.uint8, device=self.device)

    def begin(self) -> None:
        self._ballast = None


_ENGINES: WeakValueDictionary[int, EngineMemory] = WeakValueDictionary()
