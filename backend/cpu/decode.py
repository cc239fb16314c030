"""Paged, weighted decode attention: one query token per request, split over its live slots.

The split length is a constant and partial results merge in slot order, so that a token's result
does not depend on the batch or on the number of threads.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit

from express_vllm.softmax import Softmax

from . import team
from .scalar import RAW, as_pointer, fast_exp, fast_tanh, widen
from .sinks import head_sinks

SPLIT = 256
_FAST = {"reassoc", "nsz", "arcp", "contract"}
#: Query heads of a KV head that share one pass over its keys and values.
_HEADS = 4


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

    def __post_init__(self) -> None:
        first, count = int(self.tokens[0]), len(self.tokens)
        adjacent = int(self.tokens[-1]) == first + count - 1
        #: Index of the requests' rows in the batch: a slice, unless other requests lie between.
        self.rows = slice(first, first + count) if adjacent else torch.from_numpy(self.tokens)
        names = ("tokens", "live", "blocks", "bias", "offsets", "tasks")
        self.addresses = {f"{name}_at": getattr(self, name).ctypes.data for name in names}

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


class _Parameters:
    heads: int
    group: int
    size: int
    block_size: int
    requests: int
    max_blocks: int
    items: int
    bias_length: int
    page_stride: int  # of the cache
    head_stride: int
    slot_stride: int
    cache_length: int
    key_token: int  # strides of new keys and values
    key_head: int
    key_length: int
    value_token: int
    value_head: int
    value_length: int
    cache_at: int  # addresses, as all below
    keys_at: int
    values_at: int
    queries_at: int
    tokens_at: int
    live_at: int
    blocks_at: int
    bias_at: int
    offsets_at: int
    tasks_at: int
    partial_at: int
    scale: float
    cap: float


_RECORD = team.Record(_Parameters)
_FIELDS = _RECORD.dtype


@njit(fastmath=_FAST, forceinline=True)
def _score(cache, bases, queries, bias, biased, scale, size, scores):
    """scores[g, i] = scale <q_g, k_i> + log w_i for four query rows, each key read once."""
    q0, q1, q2, q3 = queries[0], queries[1], queries[2], queries[3]
    for i in range(bases.shape[0]):
        # A slice, since an index of unknown sign would keep the loop from being vectorised.
        row = cache[bases[i] : bases[i] + size]
        extra = bias[i] if biased else np.float32(0.0)
        s0 = s1 = s2 = s3 = np.float32(0.0)
        for c in range(size):
            x = widen(row[c])
            s0 += q0[c] * x
            s1 += q1[c] * x
            s2 += q2[c] * x
            s3 += q3[c] * x
        scores[0, i], scores[1, i] = s0 * scale + extra, s1 * scale + extra
        scores[2, i], scores[3, i] = s2 * scale + extra, s3 * scale + extra


@njit(fastmath=_FAST, forceinline=True)
def _cap(scores, bias, biased, cap, count):
    """Soft caps of `_score`'s scores, and the log-weights that it left out."""
    inverse = np.float32(1.0) / cap
    for g in range(_HEADS):
        line = scores[g, :count]
        for i in range(count):
            line[i] = cap * fast_tanh(line[i] * inverse)
        if biased:
            for i in range(count):
                line[i] += bias[i]


@njit(fastmath=_FAST, forceinline=True)
def _accumulate(cache, bases, scores, size, sums):
    """sums[g] += sum_i scores[g, i] v_i for four query rows, four values at a time."""
    count = bases.shape[0]
    l0, l1, l2, l3 = sums[0], sums[1], sums[2], sums[3]
    for start in range(0, count, 4):
        b0, b1 = bases[start] + size, bases[min(start + 1, count - 1)] + size
        b2, b3 = (
            bases[min(start + 2, count - 1)] + size,
            bases[min(start + 3, count - 1)] + size,
        )
        v0, v1 = cache[b0 : b0 + size], cache[b1 : b1 + size]
        v2, v3 = cache[b2 : b2 + size], cache[b3 : b3 + size]
        p = scores[:, start : start + 4]  # past the end the scores are 0
        p00, p01, p02, p03 = p[0, 0], p[0, 1], p[0, 2], p[0, 3]
        p10, p11, p12, p13 = p[1, 0], p[1, 1], p[1, 2], p[1, 3]
        p20, p21, p22, p23 = p[2, 0], p[2, 1], p[2, 2], p[2, 3]
        p30, p31, p32, p33 = p[3, 0], p[3, 1], p[3, 2], p[3, 3]
        for c in range(size):
            x0, x1 = widen(v0[c]), widen(v1[c])
            x2, x3 = widen(v2[c]), widen(v3[c])
            l0[c] += (p00 * x0 + p01 * x1) + (p02 * x2 + p03 * x3)
            l1[c] += (p10 * x0 + p11 * x1) + (p12 * x2 + p13 * x3)
            l2[c] += (p20 * x0 + p21 * x1) + (p22 * x2 + p23 * x3)
            l3[c] += (p30 * x0 + p31 * x1) + (p32 * x2 + p33 * x3)


@njit(fastmath=_FAST, forceinline=True)
def _attend(
    cache, bases, queries, bias, biased, scale, capped, cap, size, out, scores, padded, sums
):  # fmt: skip
    """One split: softmax numerator, peak and total of queries [G, d] into out [G, d + 2]."""
    group, count = queries.shape[0], bases.shape[0]
    for first in range(0, group, _HEADS):
        heads = min(_HEADS, group - first)
        for g in range(_HEADS):
            padded[g] = queries[first + min(g, heads - 1)]
        _score(cache, bases, padded, bias, biased and not capped, scale, size, scores)
        if capped:
            _cap(scores, bias, biased, cap, count)
        for g in range(_HEADS):
            peak = np.float32(-3.0e38)
            for i in range(count):
                peak = max(peak, scores[g, i])
            total = np.float32(0.0)
            for i in range(count):
                scores[g, i] = fast_exp(scores[g, i] - peak)
                total += scores[g, i]
            for i in range(count, count + 3):
                scores[g, i] = np.float32(0.0)
            if g < heads:
                out[first + g, size] = peak
                out[first + g, size + 1] = total
        sums[:] = np.float32(0.0)
        _accumulate(cache, bases, scores, size, sums)
        for g in range(heads):
            out[first + g, :size] = sums[g]


def _split_kernel(raw: type, capped: bool):
    """The compiled split kernel for one storage type, as `widen` reads it, of logits with or
    without a soft cap.

    Its closure holds nothing compiled: numba would find no such kernel in its cache again, and
    compile it in every process.  LLVM must inline its helpers: else a kernel from the cache may
    call another version of them, which rounds otherwise, than one that was just compiled.
    """

    @cfunc(team.SIGNATURE, cache=True)
    def kernel(pointer):
        p = carray(pointer, 1, _FIELDS)[0]
        heads, size, scale, block_size = p.heads, p.size, p.scale, p.block_size
        page_stride, head_stride, slot_stride = p.page_stride, p.head_stride, p.slot_stride
        key_token, key_head, value_token, value_head = (
            p.key_token, p.key_head, p.value_token, p.value_head,
        )  # fmt: skip
        cache = carray(as_pointer(p.cache_at), p.cache_length, raw)
        keys = carray(as_pointer(p.keys_at), p.key_length, raw)
        values = carray(as_pointer(p.values_at), p.value_length, raw)
        queries = carray(as_pointer(p.queries_at), (p.requests, heads, p.group, size), np.float32)
        tokens = carray(as_pointer(p.tokens_at), p.requests, np.int64)
        live = carray(as_pointer(p.live_at), p.requests, np.int64)
        blocks = carray(as_pointer(p.blocks_at), (p.requests, p.max_blocks), np.int32)
        bias = carray(as_pointer(p.bias_at), p.bias_length, np.float32)
        offsets = carray(as_pointer(p.offsets_at), p.requests, np.int64)
        tasks = carray(as_pointer(p.tasks_at), (p.items, 2), np.int64)
        partial = carray(as_pointer(p.partial_at), (p.items, heads, p.group, size + 2), np.float32)
        bases = np.empty(SPLIT, np.int64)
        scores = np.empty((_HEADS, SPLIT + 3), np.float32)
        padded = np.empty((_HEADS, size), np.float32)
        sums = np.empty((_HEADS, size), np.float32)
        while True:
            task = team.claim(pointer)
            if task >= p.tasks:
                return
            head, item = task % heads, task // heads
            request, first = tasks[item, 0], tasks[item, 1] * SPLIT
            count = min(SPLIT, live[request] - first)
            for i in range(count):
                slot = first + i
                block = np.int64(blocks[request, slot // block_size])
                offset = (slot % block_size) * slot_stride
                bases[i] = block * page_stride + head * head_stride + offset
            if first + count == live[request]:
                base, token = bases[count - 1], tokens[request]
                for c in range(size):
                    cache[base + c] = keys[token * key_token + head * key_head + c]
                    cache[base + size + c] = values[token * value_token + head * value_head + c]
            start = offsets[request]
            biased = start >= 0
            slice_ = bias[start + first : start + first + count] if biased else bias[:0]
            _attend(
                cache, bases[:count], queries[request, head], slice_, biased, scale, capped, p.cap,
                size, partial[item, head], scores, padded, sums,
            )  # fmt: skip

    return kernel


@functools.cache
def kernels(capped: bool, /) -> dict[torch.dtype, Any]:
    """Split kernels by storage type, compiled or loaded when they are first asked for."""
    return {dtype: _split_kernel(raw, capped) for dtype, raw in RAW.items()}


kernels(False)


@njit(fastmath=_FAST, cache=True)
def _merge(partial, firsts, sinks, out):
    """Combine the sinks [KV, G] and a request's splits in slot order: partial [N, KV, G, d + 2]
    -> out [R, KV, G, d]."""
    requests, heads, group, size = out.shape
    for r in range(requests):
        for h in range(heads):
            for g in range(group):
                peak = sinks[h, g]
                for item in range(firsts[r], firsts[r + 1]):
                    peak = max(peak, partial[item, h, g, size])
                total = fast_exp(sinks[h, g] - peak)
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
    softmax: Softmax,
) -> torch.Tensor:
    """Write each request's new key and value to its last live slot, then attend to all of them.

    queries: fp32 [R, KV heads, group, d], contiguous.  keys, values: [T, KV heads, d] in the
    cache's dtype.  kv_cache: [blocks, KV heads, block size, 2 d].
    -> fp32 [R, KV heads, group, d].
    """
    requests, heads, group, size = queries.shape
    items = len(batch.tasks)
    partial = np.empty((items, heads, group, size + 2), np.float32)
    page_stride, head_stride, slot_stride, _ = kv_cache.stride()
    key_token, key_head, _ = keys.stride()
    value_token, value_head, _ = values.stride()
    team.run(
        kernels(bool(softmax.cap))[kv_cache.dtype], _RECORD, items * heads,
        {
            "heads": heads,
            "group": group,
            "size": size,
            "block_size": kv_cache.shape[2],
            "requests": requests,
            "max_blocks": batch.blocks.shape[1],
            "items": items,
            "bias_length": len(batch.bias),
            "page_stride": page_stride,
            "head_stride": head_stride,
            "slot_stride": slot_stride,
            "cache_length": len(kv_cache) * page_stride,
            "key_token": key_token,
            "key_head": key_head,
            "key_length": len(keys) * key_token,
            "value_token": value_token,
            "value_head": value_head,
            "value_length": len(values) * value_token,
            "cache_at": kv_cache.data_ptr(),
            "keys_at": keys.data_ptr(),
            "values_at": values.data_ptr(),
            "queries_at": queries.data_ptr(),
            "partial_at": partial.ctypes.data,
            "scale": softmax.scale,
            "cap": softmax.cap,
            **batch.addresses,
        },
    )  # fmt: skip
    out = np.empty(tuple(queries.shape), np.float32)
    _merge(partial, batch.firsts, head_sinks(softmax, heads, group), out)
    return torch.from_numpy(out)
