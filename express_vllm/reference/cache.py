"""Streaming Express cache of one layer and KV head: the oracle for every faster path.

Tokens enter one at a time, each with its key, value and the queries of its KV head's group; a
compaction runs before the token at an event position (layout.Event).  Source: Express Language
Modeling (arXiv 2606.10944), streaming compression; heavy hitters: docs/algorithm.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import rng
from ..layout import Event, Layout
from ..schedules import DRAW, HALVE
from ..shape import RING_ROWS
from ..softmax import Softmax
from .attention import attend, log_weights, logits, shares
from .halving import halve


class ExpressCache:
    """The live keys and values [live, d], their positions and the last query rows."""

    def __init__(
        self,
        layout: Layout,
        head_size: int,
        *,
        seed: int = 0,
        layer: int = 0,
        kv_head: int = 0,
        softmax: Softmax | None = None,  # its sinks: of the KV head's group [G]
        dtype: torch.dtype = torch.float64,
        kernel: str | None = None,
        row_dtype: torch.dtype | None = None,
    ) -> None:
        self.layout = layout
        self.shape = layout.shape
        self.kernel = kernel or self.shape.kernel
        self.softmax = softmax or Softmax(head_size**-0.5)
        self.identity = (seed, layer, kv_head)
        self.keys = torch.zeros(0, head_size, dtype=dtype)
        self.values = torch.zeros(0, head_size, dtype=dtype)
        self.positions = torch.zeros(0, dtype=torch.long)
        self.rows = torch.zeros(0)  # the last queries, [up to RING_ROWS, G, d]
        self.row_dtype = row_dtype or dtype  # a paged cache stores the query rows rounded
        self.tokens = 0

    def extend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Process L tokens: queries [L, G, d], keys and values [L, d] -> outputs [L, G, d]."""
        outputs = [self._step(q, k, v) for q, k, v in zip(queries, keys, values, strict=True)]
        return torch.stack(outputs) if outputs else torch.zeros_like(queries)

    def _step(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for event in self.layout.events(self.tokens, self.tokens + 1):
            self._compact(event)
        self.keys = torch.cat([self.keys, key[None].to(self.keys)])
        self.values = torch.cat([self.values, value[None].to(self.values)])
        self.positions = torch.cat([self.positions, torch.tensor([self.tokens])])
        row = query.to(self.row_dtype).to(self.keys)[None]
        self.rows = torch.cat([self.rows, row])[-RING_ROWS:] if self.tokens else row
        self.tokens += 1
        logw = log_weights(self.layout.segments(self.tokens), self.keys.dtype)
        return attend(query[None].to(self.keys), self.keys, self.values, logw, self.softmax)[0]

    def _compact(self, event: Event) -> None:
        order = torch.arange(event.live_before)
        if self.shape.heavy:
            order = order[self._heavy_order(event)]
        event_key = rng.key(*self.identity, event.position)
        for index, op in enumerate(event.ops):
            group = order[op.start : op.start + op.length]
            if op.kind == HALVE:
                chosen = halve(
                    self.keys[group], self.values[group], event_key, index, kind=self.kernel
                )
            elif op.kind == DRAW:
                chosen = torch.tensor([draw(op.length, op.seen, event_key, index)])
            order = torch.cat([order[: op.start], group[chosen], order[op.start + op.length :]])
        assert len(order) == event.live_after
        self.keys, self.values, self.positions = (
            self.keys[order],
            self.values[order],
            self.positions[order],
        )

    def _heavy_order(self, event: Event) -> Tensor:
        """Slots reordered: the heavy hitters first, the rest of the candidates after the coreset.

        Candidates are the present heavy hitters and the incoming tokens, all of weight 1; the
        `shape.heavy` with the largest attention mass from the last rows stay (ties: lower slot).
        """
        shape = self.shape
        slots = torch.arange(event.live_before)
        stop = event.incoming_start + event.incoming
        old = slots[shape.sinks : shape.coreset_start]
        coreset = slots[shape.coreset_start : event.incoming_start]
        candidates = torch.cat([old, slots[event.incoming_start : stop]])
        mass = self.attention_mass()[candidates]
        ranked = torch.sort(mass, descending=True, stable=True).indices[: shape.heavy]
        chosen = torch.zeros(len(candidates), dtype=torch.bool)
        chosen[ranked] = True
        return torch.cat(
            [
                slots[: shape.sinks],
                candidates[chosen],
                coreset,
                candidates[~chosen],
                slots[stop:],
            ]
        )

    def attention_mass(self) -> Tensor:
        """Attention that the last query rows pay to each slot, [live]; causal, weights included.

        The query heads of the group take turns: a row is the query of one head.
        """
        logw = log_weights(self.layout.segments(self.tokens), self.keys.dtype)
        count = len(self.rows)
        turns = torch.arange(count)
        heads = turns % self.rows.shape[1]
        rows, sinks = self.rows[turns, heads], self.softmax.sinks
        scores = logits(rows @ self.keys.T, self.softmax) + logw
        last = len(self.keys) - count + torch.arange(count)
        hidden = torch.arange(len(self.keys))[None, :] > last[:, None]
        scores = scores.masked_fill(hidden, float("-inf"))
        return shares(scores, None if sinks is None else sinks[heads]).sum(0)


def draw(length: int, seen: int, event_key: int, op: int) -> int:
    """Reservoir choice among `length` entries of which the first counts `seen` times (0: once)."""
    total = seen + length - (1 if seen else 0)
    ticket = math.floor(rng.uniform(rng.bits(event_key, op, rng.STREAM_DRAW, 0)) * total)
    return max(0, ticket - seen + 1) if seen else ticket
