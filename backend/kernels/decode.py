"""Weighted attention of one new token per request over its paged live slots, split along the slots.

The split length follows from a request's own slots, so its result does not depend on its batch.
Log-weights come from segment boundaries: the weight of a slot is a sum of steps at the boundaries
before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from express_vllm.layout import RING_ROWS, Segment

from .launch import kernel
from .pages import store_token_kernel
from .rows import slot_rows, wide

#: Slots that one program reads, or a multiple: no request has more than MAX_SPLITS splits, since
#: the grid that a CUDA graph captures holds that many programs for every request.
SPLIT = 512
MAX_SPLITS = 16
#: Most segments of a layout: levels, drawn entry, exact parts (a weight of 2^60 is out of reach).
MAX_SEGMENTS = 32


def segment_steps(segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """First slot of each segment, int32 [MAX_SEGMENTS], and the rise of log2 w there."""
    if len(segments) > MAX_SEGMENTS:
        raise ValueError(f"a layout has {len(segments)} segments, the most is {MAX_SEGMENTS}")
    starts = np.full(MAX_SEGMENTS, np.iinfo(np.int32).max, np.int32)
    steps = np.zeros(MAX_SEGMENTS, np.float32)
    slot, before = 0, 0.0
    for i, segment in enumerate(segments):
        starts[i], steps[i] = slot, segment.log2_weight - before
        slot, before = slot + segment.length, segment.log2_weight
    return starts, steps


@triton.jit
def split_length(count, splits, LENGTH: tl.constexpr):
    return LENGTH * tl.maximum(tl.cdiv(count, LENGTH * splits), 1)


@kernel
def decode_kernel(
    query, pages, table, live, starts, steps,
    part, norm,  # fp32 out [R, heads, splits, D], [R, heads, splits, 2]
    s_query: tl.int32, s_query_head: tl.int32, s_page: tl.int64, s_head: tl.int64,
    s_slot: tl.int32, s_table: tl.int32, scale2, splits: tl.int32,
    GROUP: tl.constexpr, M: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, N: tl.constexpr,
    LENGTH: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Softmax over one split of one request's slots, unnormalised, for a KV head's query heads."""
    i_split, i_head, i_request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = tl.load(live + i_request)
    length = split_length(count, splits, LENGTH)
    begin = i_split * length
    if begin >= count:
        return
    end = tl.minimum(begin + length, count)
    o_m, o_n, o_d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, D_PAD)
    o_s = tl.arange(0, SEGMENTS)
    m_d, m_m = o_d < D, o_m < GROUP
    i_query_head = i_head * GROUP + o_m
    p_query = query + i_request.to(tl.int64) * wide(s_query)
    p_query += i_query_head * wide(s_query_head)
    b_q = tl.load(p_query[:, None] + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)
    b_start = tl.load(starts + i_request * SEGMENTS + o_s)
    b_step = tl.load(steps + i_request * SEGMENTS + o_s)
    p_table = table + i_request.to(tl.int64) * s_table
    p_slots = pages + i_head * wide(s_head)
    b_acc = tl.zeros([M, D_PAD], tl.float32)
    b_most = tl.full([M], -1.0e30, tl.float32)
    b_sum = tl.zeros([M], tl.float32)
    for first in range(begin, end, N):
        i_slot = first + o_n
        m_slot = i_slot < end
        i_slot = tl.where(m_slot, i_slot, end - 1)
        p_row = slot_rows(i_slot, p_slots, p_table, s_page, s_slot, BLOCK_SIZE)
        b_k = tl.load(p_row[:, None] + o_d[None, :], mask=m_d[None, :], other=0.0)
        b_v = tl.load(p_row[:, None] + D + o_d[None, :], mask=m_d[None, :], other=0.0)
        b_bias = tl.sum(tl.where(b_start[None, :] <= i_slot[:, None], b_step[None, :], 0.0), 1)
        b_score = tl.dot(b_q, tl.trans(b_k), input_precision="tf32x3") * scale2 + b_bias[None, :]
        b_score = tl.where(m_slot[None, :], b_score, -1.0e30)
        b_new = tl.maximum(b_most, tl.max(b_score, 1))
        b_share = tl.where(m_slot[None, :], tl.exp2(b_score - b_new[:, None]), 0.0)
        b_fade = tl.exp2(b_most - b_new)
        b_sum = b_sum * b_fade + tl.sum(b_share, 1)
        b_acc = b_acc * b_fade[:, None]
        b_acc = tl.dot(b_share.to(b_v.dtype), b_v, b_acc, input_precision="tf32x3")
        b_most = b_new
    heads = tl.num_programs(1) * GROUP
    i_part = (i_request.to(tl.int64) * heads + i_query_head) * splits + i_split
    tl.store(part + i_part[:, None] * D + o_d[None, :], b_acc, mask=m_m[:, None] & m_d[None, :])
    tl.store(norm + 2 * i_part, b_most, mask=m_m)
    tl.store(norm + 2 * i_part + 1, b_sum, mask=m_m)


@kernel
def combine_kernel(
    part, norm, live, output, s_output: tl.int32, s_output_head: tl.int32, splits: tl.int32,
    D: tl.constexpr, D_PAD: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """Add up a query head's splits in order; padding requests (live = 0) give zeros."""
    i_head, i_request = tl.program_id(0), tl.program_id(1)
    count = tl.load(live + i_request)
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    i_part = (i_request.to(tl.int64) * tl.num_programs(0) + i_head) * splits
    b_acc = tl.zeros([D_PAD], tl.float32)
    most = tl.full([], -1.0e30, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for i in range(tl.cdiv(count, split_length(count, splits, LENGTH))):
        peak = tl.load(norm + 2 * (i_part + i))
        sums = tl.load(norm + 2 * (i_part + i) + 1)
        new = tl.maximum(most, peak)
        fade, share = tl.exp2(most - new), tl.exp2(peak - new)
        b_part = tl.load(part + (i_part + i) * D + o_d, mask=m_d, other=0.0)
        b_acc = b_acc * fade + b_part * share
        total = total * fade + sums * share
        most = new
    b_acc = b_acc / tl.where(total > 0.0, total, 1.0)
    p_output = output + i_request.to(tl.int64) * s_output + i_head * s_output_head
    tl.store(p_output + o_d, b_acc.to(output.dtype.element_ty), mask=m_d)


class DecodeScratch:
    """Partial results of up to `requests` requests of up to `slots` live slots, fp32."""

    def __init__(self, requests: int, heads: int, size: int, slots: int, device) -> None:
        self.splits = min(triton.cdiv(slots, SPLIT), MAX_SPLITS)
        shape = (requests, heads, self.splits)
        self.part = torch.empty(*shape, size, dtype=torch.float32, device=device)
        self.norm = torch.empty(*shape, 2, dtype=torch.float32, device=device)


def decode_attention(
    query: Tensor, kv_cache: Tensor, table: Tensor, live: Tensor, starts: Tensor, steps: Tensor,
    scale: float, scratch: DecodeScratch, output: Tensor, *, block: int = 0, warps: int = 0,
) -> Tensor:  # fmt: skip
    """softmax(scale q.k + log w) v of each request's token, its own slot included.

    query, output [R, heads, d]; kv_cache [blocks, KV heads, block size, 2 d], key | value; table
    [R, blocks] int32; live [R] int32 (0: padding, its output is 0); starts, steps
    [R, MAX_SEGMENTS] (`segment_steps`).  The grid depends on R and scratch.splits alone, so a
    CUDA graph may capture it.
    """
    requests, heads, size = query.shape
    kv_heads, block_size = kv_cache.shape[1], kv_cache.shape[2]
    group = heads // kv_heads
    padded = triton.next_power_of_2(size)
    s_page, s_head, s_slot, _ = kv_cache.stride()
    decode_kernel[(scratch.splits, kv_heads, requests)](
        query, kv_cache, table, live, starts, steps, scratch.part, scratch.norm,
        query.stride(0), query.stride(1), s_page, s_head, s_slot, table.stride(0),
        scale * 1.4426950408889634, scratch.splits, group, max(16, triton.next_power_of_2(group)),
        size, padded, block or (128 if padded <= 128 else 64), SPLIT, MAX_SEGMENTS, block_size,
        num_warps=warps or 4, num_stages=3,
    )  # fmt: skip
    combine_kernel[(heads, requests)](
        scratch.part, scratch.norm, live, output, output.stride(0), output.stride(1),
        scratch.splits, size, padded, SPLIT, num_warps=1,
    )  # fmt: skip
    return output


def ring_word(first: Any, row: Any) -> Any:
    """Where the query of ring row `row` is kept, of a ring whose first slot is `first` (integers or
    arrays): (2 slot + half) * RING_ROWS + row."""
    return (2 * first + row) * RING_ROWS + row


def store_tokens(
    query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, table: Tensor, live: Tensor,
    ring: Tensor,
) -> None:  # fmt: skip
    """Write each request's new key and value [R, KV heads, d] to slot live - 1 and, where ring
    [R] int32 >= 0, the query of one head to the ring: `ring_word`."""
    requests, kv_heads, size = key.shape
    s_page, s_head, s_slot, _ = kv_cache.stride()
    store_token_kernel[(requests, kv_heads)](
        query, key, value, kv_cache, table, live, ring, query.stride(0), query.stride(1),
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), s_page, s_head, s_slot,
        table.stride(0), size, triton.next_power_of_2(size), query.shape[1] // kv_heads,
        kv_cache.shape[2], num_warps=1,
    )  # fmt: skip
