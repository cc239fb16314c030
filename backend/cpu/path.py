"""One layer's attention on the CPU: decodes on the pages, everything else on a dense copy."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from express_vllm.layout import Layout
from express_vllm.shape import RING_ROWS
from express_vllm.softmax import Softmax

from .. import timing
from .compaction import compact
from .decode import decode_attention
from .prefill import attend_piece

if TYPE_CHECKING:
    from ..chunk import Chunk
    from .metadata import Compaction, DenseChunk, ExpressMetadata, RingWrite


class CpuPath:
    """Runs a step's plan for one layer.  All arithmetic is fp32."""

    def __init__(
        self,
        layer: int,
        first_kv_head: int,
        kv_heads: int,
        group_size: int,
        size: int,
        softmax: Softmax,
        kernel: str | None = None,
    ) -> None:
        self.layer = layer
        self.first_kv_head = first_kv_head
        self.kv_heads = kv_heads
        self.group_size = group_size  # query heads of a KV head
        self.size = size
        self.softmax = softmax
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
        if plan.idle:
            output.zero_()
        query = query.view(-1, self.kv_heads, self.group_size, self.size)
        output = output.view(-1, self.kv_heads, self.group_size, self.size)
        for dense in plan.dense:
            self._dense(query, key, value, kv_cache, dense, output)
        if plan.decode is not None:
            rows = query[plan.decode.rows].float().contiguous()
            result = decode_attention(rows, key, value, kv_cache, plan.decode, self.softmax)
            output[plan.decode.rows] = result.to(output.dtype)
        if plan.ring is not None:
            self._write_ring(query, kv_cache, plan.ring)

    def _write_ring(self, query: Tensor, kv_cache: Tensor, ring: RingWrite) -> None:
        block_size = kv_cache.shape[2]
        slots, halves = torch.from_numpy(ring.slots), torch.from_numpy(ring.rows % 2)
        tokens, turns = torch.from_numpy(ring.tokens), torch.from_numpy(ring.rows % self.group_size)
        rows = query[tokens, :, turns].to(kv_cache.dtype)
        pages = kv_cache.unflatten(3, (2, self.size))
        pages[slots // block_size, :, slots % block_size, halves] = rows

    def _dense(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        dense: DenseChunk,
        output: Tensor,
    ) -> None:
        """Gather the state, run the pieces, scatter the result."""
        chunk, pieces = dense.chunk, dense.pieces
        rows = slice(chunk.token, chunk.token + chunk.stop - chunk.start)
        queries = query[rows]
        final_live = chunk.layout.live(chunk.stop)
        capacity = max([p.live + p.stop - p.start for p in pieces])
        state = torch.empty(self.kv_heads, capacity, 2 * self.size)
        slots = pieces[0].live
        if slots:
            state[:, :slots] = self._read(kv_cache, dense.blocks, 0, slots)
        new = torch.cat([key[rows], value[rows]], -1).transpose(0, 1).float()
        query_rows = self._query_rows(queries, kv_cache, dense)
        moved = False
        spare: Tensor | None = None
        for piece in pieces:
            length = piece.stop - piece.start
            if length:
                offset = piece.start - chunk.start
                state[:, piece.live : piece.live + length] = new[:, offset : offset + length]
                attend_piece(
                    queries[offset : offset + length], state[:, : piece.live + length],
                    piece.bias, self.softmax, output[rows][offset : offset + length],
                )  # fmt: skip
            if piece.compaction is not None:
                spare = torch.empty_like(state) if spare is None else spare
                self._compact(state, spare, query_rows, chunk, piece.compaction)
                state, spare = spare, state
                moved = True
        first = 0 if moved else slots
        self._write(kv_cache, dense.blocks, first, state[:, first:final_live])
        self._keep_query_rows(query_rows, kv_cache, dense)

    def _compact(
        self,
        state: Tensor,
        target: Tensor,
        query_rows: Tensor,
        chunk: Chunk,
        compaction: Compaction,
    ) -> None:
        shape = chunk.layout.shape
        # `query_rows` starts RING_ROWS before the chunk, so the rows before the event start here.
        first = compaction.event.position - chunk.start
        rows = query_rows[:, first : first + RING_ROWS].contiguous().numpy()
        begin = time.perf_counter()
        compact(
            state.numpy(), target.numpy(), rows, compaction.log_weight,
            (compaction.event, shape, compaction.ops), seed=chunk.seed, layer=self.layer,
            first_head=self.first_kv_head, softmax=self.softmax,
            kernel=self.kernel or shape.kernel,
        )  # fmt: skip
        timing.add(time.perf_counter() - begin)

    def _query_rows(self, queries: Tensor, kv_cache: Tensor, dense: DenseChunk) -> Tensor:
        """Query rows of positions [start - RING_ROWS, stop), fp32 [KV heads, ..., d].

        The query heads of a KV head take turns over an event's rows.  Rows before `start` come from
        the ring if the next event scores with them, else they are 0.
        """
        layout, start, stop = dense.chunk.layout, dense.chunk.start, dense.chunk.stop
        query_rows = torch.zeros(self.kv_heads, RING_ROWS + stop - start, self.size)
        if not layout.shape.ring:
            return query_rows
        turns = torch.from_numpy(layout.ring_row(np.arange(start, stop))) % self.group_size
        rows = queries[torch.arange(stop - start), :, turns].to(kv_cache.dtype)
        query_rows[:, RING_ROWS:] = rows.transpose(0, 1).float()
        kept = _rows_kept(layout, start)
        if kept > 0:
            ring = self._read(kv_cache, dense.blocks, layout.ring_start, layout.shape.slots)
            ring = ring.reshape(self.kv_heads, RING_ROWS, self.size)
            query_rows[:, RING_ROWS - kept : RING_ROWS] = ring[:, :kept]
        return query_rows

    def _keep_query_rows(self, query_rows: Tensor, kv_cache: Tensor, dense: DenseChunk) -> None:
        """Store the rows that the event after this step will need."""
        layout, start, stop = dense.chunk.layout, dense.chunk.start, dense.chunk.stop
        kept = _rows_kept(layout, stop)
        if kept <= 0:
            return
        ring = torch.zeros(self.kv_heads, RING_ROWS, self.size)
        end = RING_ROWS + stop - start
        ring[:, :kept] = query_rows[:, end - kept : end]
        rows = ring.reshape(self.kv_heads, layout.shape.ring, 2 * self.size)
        self._write(kv_cache, dense.blocks, layout.ring_start, rows)

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


def _rows_kept(layout: Layout, tokens: int) -> int:
    """Rows that the ring holds when `tokens` tokens are stored; at most 0: none."""
    return layout.ring_row(tokens - 1) + 1
