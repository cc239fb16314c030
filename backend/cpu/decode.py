"""Paged, weighted decode attention: one query token per request, split over its live slots.

The split length is a constant and partial results merge in slot order, so that a token's result
does not depend on the batch or on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numba import carray, cfunc, njit

from . import team
from .scalar import BFLOAT16, FLOAT16, FLOAT32, as_pointer, fast_exp, widen

SPLIT = 256
_FAST = {"reassoc", "nsz", "arcp", "contract"}
_WORDS = 40


@dataclass
class DecodeBatch:
    """Single-token requests of a step; every array is int64 unless stated.

    tokens [R]: row of the request's token in the batch; live [R]: slots to attend, its own
    included; blocks [R, B] int32: block table; bias [sum] fp32 with offsets [R] (-1: no weights);
    tasks [N, 2]: (request, split); firsts [R + 1]: a request's first task.
    """

    tokens: np.ndarray
    live: np.ndarray
    blocks: np.ndarray
    bias: np.ndarray
    offsets: np.ndarray
    tasks: np.ndarray
    firsts: np.ndarray

    @classmethod
    def make(
        cls, tokens: list[int], live: list[int], blocks: np.ndarray, biases: list[np.ndarray | None]
    ) -> DecodeBatch:
        splits = [-(-count // SPLIT) for count in live]
        tasks = [(r, s) for r, count in enumerate(splits) for s in range(count)]
        offsets, parts, total = [], [np.zeros(0, np.float32)], 0
        for bias in biases:
            offsets.append(-1 if bias is None else total)
            if bias is not None:
                parts.append(bias)
                total += len(bias)
        return cls(
            np.array(tokens, np.int64), np.array(live, np.int64), np.ascontiguousarray(blocks),
            np.concatenate(parts), np.array(offsets, np.int64), np.array(tasks, np.int64),
            np.concatenate([[0], np.cumsum(splits)]).astype(np.int64),
        )  # fmt: skip


def _split_kernel(kind: int, raw: type):
    """The compiled split kernel for one storage type."""

    @njit(fastmath=_FAST, cache=True)
    def attend(cache, bases, queries, bias, biased, scale, size, accumulator, scores, tile):
        """Softmax numerator of slots at `bases` into accumulator [G, d + 2] (…, max, sum)."""
        group, count = queries.shape[0], bases.shape[0]
        row = tile[0]
        for i in range(count):
            base = bases[i]
            for c in range(size):
                row[c] = widen(cache[base + c], kind)
            extra = bias[i] if biased else np.float32(0.0)
            for g in range(group):
                query = queries[g]
                dot = np.float32(0.0)
                for c in range(size):
                    dot += query[c] * row[c]
                scores[g, i] = dot * scale + extra
        for g in range(group):
            peak = np.float32(-3.0e38)
            for i in range(count):
                peak = max(peak, scores[g, i])
            total = np.float32(0.0)
            for i in range(count):
                scores[g, i] = fast_exp(scores[g, i] - peak)
                total += scores[g, i]
            accumulator[g, size] = peak
            accumulator[g, size + 1] = total
            for c in range(size):
                accumulator[g, c] = np.float32(0.0)
        for start in range(0, count, 4):
            rows = min(4, count - start)
            for t in range(4):
                base = bases[start + min(t, rows - 1)] + size
                for c in range(size):
                    tile[t, c] = widen(cache[base + c], kind)
            v0, v1, v2, v3 = tile[0], tile[1], tile[2], tile[3]
            for g in range(group):
                p0 = scores[g, start]
                p1 = scores[g, start + 1] if rows > 1 else np.float32(0.0)
                p2 = scores[g, start + 2] if rows > 2 else np.float32(0.0)
                p3 = scores[g, start + 3] if rows > 3 else np.float32(0.0)
                line = accumulator[g]
                for c in range(size):
                    line[c] += (p0 * v0[c] + p1 * v1[c]) + (p2 * v2[c] + p3 * v3[c])

    @cfunc(team.SIGNATURE, cache=True)
    def kernel(pointer):
        words = carray(pointer, _WORDS, np.int64)
        heads, group, size, block_size, requests, max_blocks, task_count, bias_count = (
            words[2], words[3], words[4], words[5], words[6], words[7], words[8], words[9],
        )  # fmt: skip
        stride_block, stride_head, stride_slot, cache_length = (
            words[10], words[11], words[12], words[13],
        )  # fmt: skip
        key_token, key_head, key_length, value_token, value_head, value_length = (
            words[14], words[15], words[16], words[17], words[18], words[19],
        )  # fmt: skip
        cache = carray(as_pointer(words[20]), cache_length, raw)
        keys = carray(as_pointer(words[21]), key_length, raw)
        values = carray(as_pointer(words[22]), value_length, raw)
        queries = carray(as_pointer(words[23]), (requests, heads, group, size), np.float32)
        tokens = carray(as_pointer(words[24]), requests, np.int64)
        live = carray(as_pointer(words[25]), requests, np.int64)
        blocks = carray(as_pointer(words[26]), (requests, max_blocks), np.int32)
        bias = carray(as_pointer(words[27]), bias_count, np.float32)
        offsets = carray(as_pointer(words[28]), requests, np.int64)
        tasks = carray(as_pointer(words[29]), (task_count, 2), np.int64)
        partial = carray(as_pointer(words[30]), (task_count, heads, group, size + 2), np.float32)
        scale = carray(as_pointer(words[31]), 1, np.float32)[0]
        bases = np.empty(SPLIT, np.int64)
        scores = np.empty((group, SPLIT), np.float32)
        tile = np.empty((4, size), np.float32)
        while True:
            task = team.claim(pointer)
            if task >= words[team.TASKS]:
                return
            head, item = task % heads, task // heads
            request, first = tasks[item, 0], tasks[item, 1] * SPLIT
            count = min(SPLIT, live[request] - first)
            for i in range(count):
                slot = first + i
                block = np.int64(blocks[request, slot // block_size])
                offset = (slot % block_size) * stride_slot
                bases[i] = block * stride_block + head * stride_head + offset
            if first + count == live[request]:
                base, token = bases[count - 1], tokens[request]
                for c in range(size):
                    cache[base + c] = keys[token * key_token + head * key_head + c]
                    cache[base + size + c] = values[token * value_token + head * value_head + c]
            start = offsets[request]
            biased = start >= 0
            slice_ = bias[start + first : start + first + count] if biased else bias[:0]
            attend(
                cache, bases[:count], queries[request, head], slice_, biased, scale, size,
                partial[item, head], scores, tile,
            )  # fmt: skip

    return kernel


_KERNELS = {
    torch.bfloat16: _split_kernel(BFLOAT16, np.uint16),
    torch.float16: _split_kernel(FLOAT16, np.uint16),
    torch.float32: _split_kernel(FLOAT32, np.uint32),
}


@njit(fastmath=_FAST, cache=True)
def _merge(partial, firsts, out):
    """Combine a request's splits in slot order: partial [N, KV, G, d + 2] -> out [R, KV, G, d]."""
    requests, heads, group, size = out.shape
    for r in range(requests):
        for h in range(heads):
            for g in range(group):
                peak = np.float32(-3.0e38)
                for item in range(firsts[r], firsts[r + 1]):
                    peak = max(peak, partial[item, h, g, size])
                total = np.float32(0.0)
                line = out[r, h, g]
                for c in range(size):
                    line[c] = np.float32(0.0)
                for item in range(firsts[r], firsts[r + 1]):
                    part = partial[item, h, g]
                    weight = fast_exp(part[size] - peak)
                    total += weight * part[size + 1]
                    for c in range(size):
                        line[c] += weight * part[c]
                total = np.float32(1.0) / total
                for c in range(size):
                    line[c] *= total


def decode_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: DecodeBatch,
    scale: float,
) -> torch.Tensor:
    """Write each request's new key and value to its last live slot, then attend to all of them.

    queries: fp32 [R, KV heads, group, d], contiguous.  keys, values: [T, KV heads, d] in the cache's
    dtype.  kv_cache: [blocks, KV heads, block size, 2 d].  -> fp32 [R, KV heads, group, d].
    """
    requests, heads, group, size = queries.shape
    items = len(batch.tasks)
    partial = np.empty((items, heads, group, size + 2), np.float32)
    factor = np.array([scale], np.float32)
    length = 1 + sum((n - 1) * s for n, s in zip(kv_cache.shape, kv_cache.stride(), strict=True))
    span = keys.shape[0]
    team.run(
        _KERNELS[kv_cache.dtype], items * heads,
        [
            heads, group, size, kv_cache.shape[2], requests, batch.blocks.shape[1], items,
            len(batch.bias), kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2), length,
            keys.stride(0), keys.stride(1), span * keys.stride(0), values.stride(0),
            values.stride(1), span * values.stride(0), kv_cache.data_ptr(), keys.data_ptr(),
            values.data_ptr(), queries.data_ptr(), batch.tokens.ctypes.data,
            batch.live.ctypes.data, batch.blocks.ctypes.data, batch.bias.ctypes.data,
            batch.offsets.ctypes.data, batch.tasks.ctypes.data, partial.ctypes.data,
            factor.ctypes.data, *[0] * (_WORDS - 32),
        ],
    )  # fmt: skip
    out = np.empty(tuple(queries.shape), np.float32)
    _merge(partial, batch.firsts, out)
    return torch.from_numpy(out)
