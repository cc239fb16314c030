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

from express_vllm.layout import Segment
from express_vllm.shape import RING_ROWS
from express_vllm.softmax import Softmax

from . import constants
from .arguments import LOG2E, Decodes, Logits, Pages, Tokens
from .constants import MAX_SEGMENTS, MAX_SPLITS, SPLIT, Model
from .launch import kernel, launch
from .logits import sink_logits, to_logits
from .rows import ROWS, page_slots, slot_rows, wide


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
def split_length(count, splits, SPLIT: tl.constexpr):
    return SPLIT * tl.maximum(tl.cdiv(count, SPLIT * splits), 1)


@kernel
def decode_kernel(query: Tokens, pages: Pages, batch: Decodes, logits: Logits, C: tl.constexpr):
    """Softmax over one split of one request's slots, unnormalised, for a KV head's query heads."""
    i_split, i_head, i_request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = tl.load(batch.live + i_request)
    length = split_length(count, batch.splits, C.split)
    begin = i_split * length
    if begin >= count:
        return
    end = tl.minimum(begin + length, count)
    o_m, o_d = tl.arange(0, C.rows), tl.arange(0, C.padded)
    m_m = o_m < C.group
    m = m_m[:, None] & (o_d < C.size)[None, :]
    i_query_head = i_head * C.group + o_m
    p_query = query.data + i_request.to(tl.int64) * wide(query.token)
    p_query += i_query_head * wide(query.head)
    b_q = tl.load(p_query[:, None] + o_d[None, :], mask=m, other=0.0)
    slots = page_slots(pages, i_request.to(tl.int64), i_head, C.size)
    b_acc, b_most, b_sum = attend_split(b_q, slots, batch, i_request, begin, end, logits, C)
    heads = tl.num_programs(1) * C.group
    i_part = (i_request.to(tl.int64) * heads + i_query_head) * batch.splits + i_split
    tl.store(batch.part + i_part[:, None] * C.size + o_d[None, :], b_acc, mask=m)
    tl.store(batch.norm + 2 * i_part, b_most, mask=m_m)
    tl.store(batch.norm + 2 * i_part + 1, b_sum, mask=m_m)


@triton.jit
def attend_split(b_q, slots, batch, i_request, begin, end, logits, C: tl.constexpr):
    """Numerators [M, d], maxima and sums of exponentials [M] over slots [begin, end)."""
    o_n, o_d, o_s = tl.arange(0, C.block), tl.arange(0, C.padded), tl.arange(0, C.segments)
    m_d = o_d < C.size
    b_start = tl.load(batch.starts + i_request * C.segments + o_s)
    b_step = tl.load(batch.steps + i_request * C.segments + o_s)
    b_acc = tl.zeros([C.rows, C.padded], tl.float32)
    b_most = tl.full([C.rows], -1.0e30, tl.float32)
    b_sum = tl.zeros([C.rows], tl.float32)
    for first in range(begin, end, C.block):
        i_slot = first + o_n
        m_slot = i_slot < end
        i_slot = tl.where(m_slot, i_slot, end - 1)
        p_row = slot_rows(i_slot, slots, C.block_size)
        b_k = tl.load(p_row[:, None] + o_d[None, :], mask=m_d[None, :], other=0.0)
        b_v = tl.load(p_row[:, None] + slots.value + o_d[None, :], mask=m_d[None, :], other=0.0)
        b_bias = tl.sum(tl.where(b_start[None, :] <= i_slot[:, None], b_step[None, :], 0.0), 1)
        b_dot = tl.dot(b_q, tl.trans(b_k), input_precision="tf32x3")
        b_score = to_logits(b_dot, logits, C) + b_bias[None, :]
        b_score = tl.where(m_slot[None, :], b_score, -1.0e30)
        b_new = tl.maximum(b_most, tl.max(b_score, 1))
        b_share = tl.where(m_slot[None, :], tl.exp2(b_score - b_new[:, None]), 0.0)
        b_fade = tl.exp2(b_most - b_new)
        b_sum = b_sum * b_fade + tl.sum(b_share, 1)
        b_acc = b_acc * b_fade[:, None]
        b_acc = tl.dot(b_share.to(b_v.dtype), b_v, b_acc, input_precision="tf32x3")
        b_most = b_new
    return b_acc, b_most, b_sum


@kernel
def combine_kernel(output: Tokens, batch: Decodes, logits: Logits, C: tl.constexpr):
    """Add up a query head's splits in order, from its sink on; padding requests (live = 0) give
    zeros."""
    i_head, i_request = tl.program_id(0), tl.program_id(1)
    count = tl.load(batch.live + i_request)
    o_d = tl.arange(0, C.padded)
    m_d = o_d < C.size
    i_part = (i_request.to(tl.int64) * tl.num_programs(0) + i_head) * batch.splits
    b_acc = tl.zeros([C.padded], tl.float32)
    most = tl.full([], -1.0e30, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    if C.sinks:
        most, total = sink_logits(logits, 0, i_head) * 1.4426950408889634, total + 1.0
    for i in range(tl.cdiv(count, split_length(count, batch.splits, C.split))):
        peak = tl.load(batch.norm + 2 * (i_part + i))
        sums = tl.load(batch.norm + 2 * (i_part + i) + 1)
        new = tl.maximum(most, peak)
        fade, share = tl.exp2(most - new), tl.exp2(peak - new)
        b_part = tl.load(batch.part + (i_part + i) * C.size + o_d, mask=m_d, other=0.0)
        b_acc = b_acc * fade + b_part * share
        total = total * fade + sums * share
        most = new
    b_acc = b_acc / tl.where(total > 0.0, total, 1.0)
    p_output = output.data + i_request.to(tl.int64) * output.token + i_head * output.head
    tl.store(p_output + o_d, b_acc.to(output.data.dtype.element_ty), mask=m_d)


@kernel
def store_token_kernel(
    query: Tokens, key: Tokens, value: Tokens, pages: Pages, live,
    ring,  # int32 [R]: (2 * slot + half) * ROWS + row of the query row to keep; -1: none
    C: tl.constexpr,
):  # fmt: skip
    """Write each request's new key and value to its last live slot, its query row to the ring.
    Requests with live = 0 are padding."""
    i_request, i_head = tl.program_id(0), tl.program_id(1)
    i_slot = tl.load(live + i_request) - 1
    if i_slot < 0:
        return
    o_d = tl.arange(0, C.padded)
    m_d = o_d < C.size
    i_token = i_request.to(tl.int64)
    b_k = tl.load(key.data + i_token * key.token + i_head * key.head + o_d, mask=m_d)
    b_v = tl.load(value.data + i_token * value.token + i_head * value.head + o_d, mask=m_d)
    slots = page_slots(pages, i_token, i_head, C.size)
    p_row = slot_rows(i_slot, slots, C.block_size)
    tl.store(p_row + o_d, b_k.to(pages.data.dtype.element_ty), mask=m_d)
    tl.store(p_row + slots.value + o_d, b_v.to(pages.data.dtype.element_ty), mask=m_d)
    i_ring = tl.load(ring + i_request)
    if i_ring >= 0:
        turn, i_half = i_ring % ROWS % C.group, i_ring // ROWS
        p_query = query.data + i_token * query.token + (i_head * C.group + turn) * query.head
        b_row = tl.load(p_query + o_d, mask=m_d)
        p_row = slot_rows(i_half // 2, slots, C.block_size) + (i_half % 2) * C.size
        tl.store(p_row + o_d, b_row.to(pages.data.dtype.element_ty), mask=m_d)


class DecodeScratch:
    """Partial results of up to `requests` requests of up to `slots` live slots, fp32."""

    def __init__(self, requests: int, heads: int, size: int, slots: int, device) -> None:
        self.splits = min(triton.cdiv(slots, SPLIT), MAX_SPLITS)
        shape = (requests, heads, self.splits)
        self.part = torch.empty(*shape, size, dtype=torch.float32, device=device)
        self.norm = torch.empty(*shape, 2, dtype=torch.float32, device=device)
        self.zero = torch.zeros(1, dtype=torch.int64, device=device)  # offset of the only sinks


def decode_attention(
    query: Tensor, kv_cache: Tensor, table: Tensor, live: Tensor, starts: Tensor, steps: Tensor,
    softmax: Softmax, scratch: DecodeScratch, output: Tensor, *, block: int = 0, warps: int = 0,
) -> Tensor:  # fmt: skip
    """Weighted attention of each request's token, its own slot included, by `softmax`.

    query, output [R, heads, d]; kv_cache [blocks, KV heads, block size, 2 d], key | value; table
    [R, blocks] int32; live [R] int32 (0: padding, its output is 0); starts, steps
    [R, MAX_SEGMENTS] (`segment_steps`).  The grid depends on R and scratch.splits alone, so a
    CUDA graph may capture it.
    """
    requests, heads, _ = query.shape
    kv_heads = kv_cache.shape[1]
    variant = constants.decode(Model.of(kv_cache, heads // kv_heads, softmax), block, warps)
    logits = Logits.of(softmax, scratch.zero, LOG2E)
    batch = Decodes(live, starts, steps, scratch.part, scratch.norm, scratch.splits)
    launch(
        decode_kernel, (scratch.splits, kv_heads, requests),
        (Tokens.of(query), Pages.of(kv_cache, table), batch, logits), variant,
    )  # fmt: skip
    launch(
        combine_kernel, (heads, requests), (Tokens.of(output), batch, logits),
        variant._replace(warps=1),
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
    requests, kv_heads, _ = key.shape
    variant = constants.rows(Model.of(kv_cache, query.shape[1] // kv_heads))
    launch(
        store_token_kernel, (requests, kv_heads),
        (Tokens.of(query), Tokens.of(key), Tokens.of(value), Pages.of(kv_cache, table), live, ring),
        variant._replace(warps=1),
    )  # fmt: skip
