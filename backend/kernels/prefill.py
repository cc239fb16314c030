"""Causal attention of a step's tokens over the weighted state valid at each one's position.

A query tile lies between two events.  It attends to the stored slots of the state after the last
event (gathered through that state's list of source indices, with their log-weights) and to the
exact tokens since, which are consecutive.  The query heads of a KV head share a tile's rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .columns import REQUEST, TILE
from .launch import kernel
from .rows import request_slots, slot_rows, wait_until, wide


@triton.jit
def attend_tile(
    b_q, b_acc, b_most, b_sum, p_k, s_value, b_bias, m_seen, o_d, m_d, scale2,
    D: tl.constexpr, D_PAD: tl.constexpr, WEIGHTED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax, base 2: keys and values at rows p_k [N]."""
    # The tensor cores' parts of wider fp32 rows do not fit in shared memory.
    PRECISION: tl.constexpr = "tf32x3" if D_PAD <= 128 else "ieee"
    if D == D_PAD:
        b_k = tl.load(p_k[:, None] + o_d[None, :])
    else:
        b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m_d[None, :], other=0.0)
    b_score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale2
    if WEIGHTED:
        b_score += b_bias[None, :]
    if MASKED:
        b_score = tl.where(m_seen, b_score, -1.0e30)
    b_new = tl.maximum(b_most, tl.max(b_score, 1))
    b_share = tl.exp2(b_score - b_new[:, None])
    b_fade = tl.exp2(b_most - b_new)
    b_sum = b_sum * b_fade + tl.sum(b_share, 1)
    if D == D_PAD:
        b_v = tl.load(p_k[:, None] + s_value + o_d[None, :])
    else:
        b_v = tl.load(p_k[:, None] + s_value + o_d[None, :], mask=m_d[None, :], other=0.0)
    b_acc = b_acc * b_fade[:, None]
    b_acc = tl.dot(b_share.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    return b_acc, b_new, b_sum


@kernel
def prefill_kernel(
    query, pages, items, requests, lists, bias,
    progress,  # int32 [R, H]: lists that are written
    output,  # out, as query
    s_query: tl.int32, s_query_head: tl.int32, s_output: tl.int32, s_output_head: tl.int32,
    s_value: tl.int64, s_head: tl.int64, s_slot: tl.int32, scale2,
    heads: tl.int32, origin: tl.int32,
    wait: tl.int32,  # whether lists are written while this runs
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    # Heads first: programs start in the order in which the lists are written.
    i_head, item = tl.program_id(0), items + tl.program_id(1) * TILE.words
    row, count = tl.load(item + TILE.row), tl.load(item + TILE.tokens)
    stored, p_bias = tl.load(item + TILE.stored), bias + tl.load(item + TILE.bias)
    recent, last = tl.load(item + TILE.recent), tl.load(item + TILE.last)
    i_request = tl.load(item + TILE.request)
    request = requests + i_request * REQUEST.words
    p_slots = request_slots(pages, request, i_head, s_head, s_slot, origin, 0)
    p_list = lists + tl.load(item + TILE.list).to(tl.int64) * heads
    p_list += i_head * tl.load(request + REQUEST.width)
    needed = tl.load(item + TILE.needed)
    if needed * wait > 0:
        wait_until(progress + i_request * heads + i_head, needed)

    s_value = wide(s_value)
    o_m, o_n, o_d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, D_PAD)
    m_d = o_d < D
    i_token = o_m // GROUP
    m_row = i_token < count
    o_row = (row + i_token).to(tl.int64)
    i_query_head = i_head * GROUP + o_m % GROUP
    p_query = query + o_row * wide(s_query)
    p_query += i_query_head * wide(s_query_head)
    b_q = tl.load(p_query[:, None] + o_d[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0)
    b_acc = tl.zeros([M, D_PAD], tl.float32)
    b_most = tl.full([M], -1.0e30, tl.float32)
    b_sum = tl.zeros([M], tl.float32)
    for first in range(0, stored, N):
        i_slot = first + o_n
        m_slot = i_slot < stored
        i_source = tl.load(p_list + i_slot, mask=m_slot, other=0)
        b_bias = tl.load(p_bias + i_slot, mask=m_slot, other=-1.0e30)
        p_k = slot_rows(i_source, p_slots, lists, 0, s_slot, 0)
        b_acc, b_most, b_sum = attend_tile(
            b_q, b_acc, b_most, b_sum, p_k, s_value, b_bias, m_row[:, None], o_d, m_d, scale2,
            D, D_PAD, True, False,
        )  # fmt: skip
    # Tiles that every row of the query tile sees whole, then the diagonal ones.
    whole = recent + (last + 1 - recent) // N * N
    for first in range(recent, whole, N):
        p_k = slot_rows(first + o_n, p_slots, lists, 0, s_slot, 0)
        b_acc, b_most, b_sum = attend_tile(
            b_q, b_acc, b_most, b_sum, p_k, s_value, b_sum, m_row[:, None], o_d, m_d, scale2,
            D, D_PAD, False, False,
        )  # fmt: skip
    for first in range(whole, last + count, N):
        i_source = first + o_n
        m_seen = i_source[None, :] <= last + i_token[:, None]
        i_source = tl.minimum(i_source, last + count - 1)
        p_k = slot_rows(i_source, p_slots, lists, 0, s_slot, 0)
        b_acc, b_most, b_sum = attend_tile(
            b_q, b_acc, b_most, b_sum, p_k, s_value, b_sum, m_seen, o_d, m_d, scale2,
            D, D_PAD, False, True,
        )  # fmt: skip
    p_output = output + o_row * wide(s_output)
    p_output += i_query_head * wide(s_output_head)
    b_acc = b_acc / b_sum[:, None]
    tl.store(
        p_output[:, None] + o_d[None, :], b_acc.to(output.dtype.element_ty),
        mask=m_row[:, None] & m_d[None, :],
    )  # fmt: skip


@kernel
def wait_started_kernel(counters, programs: tl.int32):
    """Return once the compaction's programs run: attention, which waits for their lists, must not
    take the multiprocessors that they need."""
    wait_until(counters, programs)
