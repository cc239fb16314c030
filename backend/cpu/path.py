"""One layer's attention on the CPU: decodes on the pages, everything else on a dense copy."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from express_vllm.layout import RING_ROWS

from .. import timing
from . import compaction
from .decode import decode_attention
from .metadata import ring_rows
from .prefill import attend_piece

if TYPE_CHECKING:
    from .metadata import Compaction, ExpressMetadata, SequencePlan


class CpuPath:
    """Runs a step's plan for one layer.  All arithmetic is fp32."""

    def __init__(
        self,
        layer: int,
        first_kv_head: int,
        kv_heads: int,
        group: int,
        size: int,
        scale: float,
        kernel: str | None = None,
    ) -> None:
        self.layer = layer
        self.first_kv_head = first_kv_head
        self.kv_heads = kv_heads
        self.group = group
        self.size = size
        self.scale = scale
        self.kernel = kernel

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        plan: ExpressMetadata,
        output: Tensor,
    ) -> None:
        """query [T, heads, d], key and value [T, KV heads, d], output [T, heads, d] in place."""
        query = query.view(-1, self.kv_heads, self.group, self.size)
        output = output.view(-1, self.kv_heads, self.group, self.size)
        for sequence in plan.sequences:
            self._sequence(query, key, value, kv_cache, sequence, output)
        if plan.decode is not None:
            rows = query[plan.decode.rows].float().contiguous()
            result = decode_attention(rows, key, value, kv_cache, plan.decode, self.scale)
            output[plan.decode.rows] = result.to(output.dtype)
        if plan.ring.tokens:
            self._write_ring(query, kv_cache, plan)

    def _write_ring(self, query: Tensor, kv_cache: Tensor, plan: ExpressMetadata) -> None:
        ring, block_size = plan.ring, kv_cache.shape[2]
        slots, halves = torch.tensor(ring.slots), torch.tensor(ring.rows) % 2
        tokens, turns = torch.tensor(ring.tokens), torch.tensor(ring.rows) % self.group
        rows = query[tokens, :, turns].to(kv_cache.dtype)
        pages = kv_cache.unflatten(3, (2, self.size))
        pages[slots // block_size, :, slots % block_size, halves] = rows

    def _sequence(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        plan: SequencePlan,
        output: Tensor,
    ) -> None:
        """Prefill chunks and event steps: gather the state, run the pieces, scatter the result."""
        count = plan.stop - plan.start
        rows = slice(plan.first_token, plan.first_token + count)
        queries = query[rows]
        final_live = plan.layout.live(plan.stop) if plan.layout else plan.stop
        capacity = max([p.live + p.stop - p.start for p in plan.pieces])
        state = torch.empty(self.kv_heads, capacity, 2 * self.size)
        slots = plan.pieces[0].live
        if slots:
            state[:, :slots] = self._read(kv_cache, plan.blocks, 0, slots)
        new = torch.cat([key[rows], value[rows]], -1).transpose(0, 1).float()
        query_rows = self._query_rows(queries, kv_cache, plan)
        moved = False
        spare: Tensor | None = None
        for piece in plan.pieces:
            length = piece.stop - piece.start
            if length:
                offset = piece.start - plan.start
                state[:, piece.live : piece.live + length] = new[:, offset : offset + length]
                attend_piece(
                    queries[offset : offset + length], state[:, : piece.live + length],
                    piece.bias, self.scale, output[rows][offset : offset + length],
                )  # fmt: skip
            if piece.compaction is not None:
                spare = torch.empty_like(state) if spare is None else spare
                self._compact(state, spare, query_rows, plan, piece.compaction)
                state, spare = spare, state
                moved = True
        first = 0 if moved else slots
        self._write(kv_cache, plan.blocks, first, state[:, first:final_live])
        self._keep_query_rows(query_rows, kv_cache, plan)

    def _compact(
        self,
        state: Tensor,
        target: Tensor,
        query_rows: Tensor,
        plan: SequencePlan,
        step: Compaction,
    ) -> None:
        assert plan.layout is not None
        shape = plan.layout.shape
        # `query_rows` starts RING_ROWS before the chunk, so the rows before the event start here.
        first = step.event.position - plan.start
        rows = query_rows[:, first : first + RING_ROWS].contiguous().numpy()
        begin = time.perf_counter()
        compaction.compact(
            state.numpy(), target.numpy(), rows, step.log_weight, (step.event, shape, step.ops),
            seed=plan.seed, layer=self.layer, first_head=self.first_kv_head, scale=self.scale,
            kernel=self.kernel or shape.kernel,
        )  # fmt: skip
        timing.add(time.perf_counter() - begin)

    def _query_rows(self, queries: Tensor, kv_cache: Tensor, plan: SequencePlan) -> Tensor:
        """Query rows of positions [start - RING_ROWS, stop), fp32 [KV heads, ..., d].

        The heads of a group take turns over an event's rows.  Rows before `start` come from the
        ring if the next event scores with them, else they are 0.
        """
        count = plan.stop - plan.start
        query_rows = torch.zeros(self.kv_heads, RING_ROWS + count, self.size)
        if plan.layout is None or not plan.layout.shape.ring:
            return query_rows
        turns = torch.from_numpy(ring_rows(plan.layout, plan.start, plan.stop)) % self.group
        rows = queries[torch.arange(count), :, turns].to(kv_cache.dtype)
        query_rows[:, RING_ROWS:] = rows.transpose(0, 1).float()
        shape = plan.layout.shape
        kept = plan.start - (plan.layout.next_event_position(plan.start) - RING_ROWS)
        if kept > 0:
            slot = shape.slots - shape.ring
            ring = self._read(kv_cache, plan.blocks, slot, shape.slots)
            ring = ring.reshape(self.kv_heads, RING_ROWS, self.size)
            query_rows[:, RING_ROWS - kept : RING_ROWS] = ring[:, :kept]
        return query_rows

    def _keep_query_rows(self, query_rows: Tensor, kv_cache: Tensor, plan: SequencePlan) -> None:
        """Store the rows that the event after this step will need."""
        if plan.layout is None or not plan.layout.shape.ring:
            return
        shape = plan.layout.shape
        kept = plan.stop - (plan.layout.next_event_position(plan.stop) - RING_ROWS)
        if kept <= 0:
            return
        ring = torch.zeros(self.kv_heads, RING_ROWS, self.size)
        stop = RING_ROWS + plan.stop - plan.start
        ring[:, :kept] = query_rows[:, stop - kept : stop]
        slot = shape.slots - shape.ring
        rows = ring.reshape(self.kv_heads, shape.ring, 2 * self.size)
        self._write(kv_cache, plan.blocks, slot, rows)

    def _read(self, kv_cache: Tensor, blocks: np.ndarray, start: int, stop: int) -> Tensor:
        """Slots [start, stop) of a request as fp32 [KV heads, stop - start, 2 d]."""
        size = kv_cache.shape[2]
        first, last = start // size, -(-stop // size)
        pages = kv_cache[torch.from_numpy(blocks[first:last]).long()]
        dense = pages.transpose(0, 1).reshape(self.kv_heads, -1, 2 * self.size)
        return dense[:, start - first * size : stop - first * size].float()

    def _write(self, kv_cache: Tensor, blocks: np.ndarray, start: int, rows: Tensor) -> None:
        """Store fp32 rows [KV heads, L, 2 d] at slots [start, start + L) of a request."""
        size, stop = kv_cache.shape[2], start + rows.shape[1]
        rows = rows.to(kv_cache.dtype)
        slot = start
        while slot < stop:
            length = min(size - slot % size, stop - slot)
            page = kv_cache[int(blocks[slot // size])]
            page[:, slot % size : slot % size + length] = rows[
                :, slot - start : slot - start + length
            ]
            slot += length
