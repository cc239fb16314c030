"""`StepPlan`: the device tables of a step's requests, built once on the host; every layer runs it.

A plan's requests may differ in everything but the `Kind` of their shapes: sizes are fields of the
tables' records.  The rows of the events that they run are in the same copy to the device, and die
with the plan.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batch import Chunk
from .arguments import Tables
from .constants import QUERY_ROWS
from .events import Kind
from .memory import Memory
from .span import Extent, Span
from .upload import to_device
from .writer import Writer


@dataclass
class StepPlan:
    """Device tables of a step's requests, flat; see `tables.py` for the records."""

    kind: Kind | None  # None: no request has an event
    extent: Extent
    tiles: int
    tables: Tables
    zero: Tensor  # int64 [1]: 0, the offset of the only layer
    memory: Memory  # scratch that plans and layers use in turn
    cached: dict[Any, Any] = field(default_factory=dict)

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once: layers run one after the other."""
        found = self.cached.get(key)
        if found is None:
            found = self.cached[key] = make()
        return found

    @classmethod
    def make(
        cls, chunks: Sequence[Chunk], group: int, device: torch.device, compacting: bool = False,
        tile: int = QUERY_ROWS,
    ) -> StepPlan:  # fmt: skip
        """Plan `chunks`, whose query heads are `group` times the KV heads."""
        return cls.of([Span.of(c, compacting) for c in chunks], device, 0 if compacting else
                      tile // group)  # fmt: skip

    @classmethod
    def of(
        cls, spans: Sequence[Span], device: torch.device, tile: int, memory: Memory | None = None
    ) -> StepPlan:
        """Plan `spans` with query tiles of `tile` tokens; 0: no new tokens.

        Raises ValueError if events of two kinds meet.
        """
        kinds = {span.kind for span in spans if span.events}
        if len(kinds) > 1:
            raise ValueError(f"a plan's events have one kind, these have {sorted(kinds)}")
        extent = functools.reduce(operator.add, (span.extent for span in spans))
        writer = Writer(with_lists=bool(kinds))
        for span in spans:
            writer.add(span, tile)
        arrays = writer.arrays()
        *found, zero = to_device([*arrays, np.zeros(1, np.int64)], device)
        return cls(
            kinds.pop() if kinds else None, extent, len(arrays.tiles), Tables(*found), zero,
            memory or Memory(device),
        )  # fmt: skip
