"""Which heavy hitters an event keeps: attention mass of the candidates, and the largest of it.

Candidates are the present heavy hitters, then the incoming tokens.  Their scores lie candidate by
candidate ([score_width, ROWS]), so that a mass is a sum over one row, in an order of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from express_vllm.layout import RING_ROWS

from . import columns
from .pages import group_mean
from .rows import request_slots, slot_rows

ROWS = tl.constexpr(RING_ROWS)
LOW = tl.constexpr(-1.0e30)
#: Most candidates whose scores are in registers at a time.
_CHUNK = tl.constexpr(512)
#: Thresholds that one pass of `largest` tries.
_TRIES = tl.constexpr(16)


@triton.jit
def score_recent_kernel(
    query, ring_pages,  # the step's queries; the cache, whose last slots hold earlier query rows
    rows,  # out [L, I, H, ROWS, D]: query rows of every event instance
    score, peak, total,  # fp32 out [L, I, H, score_width, ROWS], [L, I, H, ROWS] twice
    instances,  # int32 [I, INSTANCES]
    requests, headers,
    pages, layer_offsets, table,
    s_query, s_query_head, s_ring_page, s_ring_head, s_ring_slot,
    s_page, s_head, s_slot, s_table,
    scale, heads, count, heavy, score_width,
    D: tl.constexpr, D_PAD: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, RING_BLOCK: tl.constexpr, HAS_NEW: tl.constexpr,
):  # fmt: skip
    """An event's query rows, their attention scores on its incoming tokens, and the maximum and sum
    of exponentials over all its recent tokens, causal."""
    i_instance, i_head, i_layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    instance = instances + i_instance * columns.INSTANCES
    i_request = tl.load(instance)
    request = requests + i_request * columns.REQUEST
    header = headers + tl.load(instance + 1) * columns.HEADER
    position, stored = tl.load(header + columns.POSITION), tl.load(header + columns.STORED)
    incoming, live = tl.load(header + columns.INCOMING), tl.load(header + columns.LIVE)
    recent = (tl.load(request + columns.SHIFT) + position - live).to(
        tl.int32
    )  # source index - slot
    p_table = table + tl.load(request + columns.TABLE) * s_table
    layer_offset = tl.multiple_of(tl.load(layer_offsets + i_layer), 16)
    p_slots = request_slots(
        pages + layer_offset, request, i_request, i_head, s_page, s_head, s_slot, BLOCK_SIZE
    )

    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    m_d = o_d < D
    # From the ring the rows before the step, from the step the others.
    kept = tl.load(instance + 2)
    m_ring = o_r < kept
    ring = tl.load(request + columns.RING).to(tl.int32)
    p_ring = slot_rows(
        tl.where(m_ring, ring + o_r // 2, 0), ring_pages + layer_offset + i_head * s_ring_head,
        p_table, s_ring_page, s_ring_slot, RING_BLOCK,
    )  # fmt: skip
    p_ring += (o_r % 2) * D
    b_q = tl.load(p_ring[:, None] + o_d[None, :], mask=m_ring[:, None] & m_d[None, :], other=0.0)
    if HAS_NEW:
        i_token = (tl.load(instance + 3) + o_r).to(tl.int64)
        p_query = query + i_token * s_query + i_head * GROUP * s_query_head
        b_mean = group_mean(p_query, o_r >= kept, s_query_head, o_d, m_d, GROUP, b_q.dtype)
        b_q = tl.where(m_ring[:, None], b_q, b_mean)
    i_row = ((i_layer * count + i_instance).to(tl.int64) * heads + i_head) * ROWS
    tl.store(rows + (i_row + o_r[:, None]) * D + o_d[None, :], b_q, mask=m_d[None, :])
    p_score = score + i_row * score_width
    b_peak = tl.full([ROWS, BLOCK], LOW, tl.float32)
    b_total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(stored, live, BLOCK):
        i_slot = first + tl.arange(0, BLOCK)
        m_slot = i_slot < live
        p_k = slot_rows(
            tl.where(m_slot, i_slot, stored) + recent, p_slots, p_table, s_page, s_slot, BLOCK_SIZE
        )
        b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m_d[None, :], other=0.0)
        b_score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        m_seen = i_slot[None, :] <= live - ROWS + o_r[:, None]
        b_score = tl.where(m_seen, b_score, LOW)
        i_candidate = heavy + i_slot - stored
        p_here = p_score + i_candidate[None, :] * ROWS + o_r[:, None]
        tl.store(p_here, b_score, mask=(i_slot < stored + incoming)[None, :])
        b_new = tl.maximum(b_peak, b_score)
        b_total = b_total * tl.exp(b_peak - b_new) + tl.where(m_seen, tl.exp(b_score - b_new), 0.0)
        b_peak = b_new
    b_most = tl.max(b_peak, 1)
    tl.store(peak + i_row + o_r, b_most)
    tl.store(total + i_row + o_r, tl.sum(b_total * tl.exp(b_peak - b_most[:, None]), 1))


@triton.jit
def score_stored(
    b_q, p_virtual, p_bias, p_slots, p_table, s_page, s_slot, p_score, p_part, scale, member,
    stored, sinks, heavy,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, SLICES: tl.constexpr,
    TEAM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """A member's share of the stored slots: scores of the heavy hitters, and for each of its slices
    (every SLICES-th tile) the maximum and sum of exponentials, [SLICES, 2, ROWS] at p_part."""
    o_r, o_d, o_n = tl.arange(0, ROWS), tl.arange(0, D_PAD), tl.arange(0, BLOCK)
    m_d = o_d < D
    for i_slice in range(member, SLICES, TEAM):
        b_peak = tl.full([ROWS, BLOCK], LOW, tl.float32)
        b_total = tl.zeros([ROWS, BLOCK], tl.float32)
        for first in range(i_slice * BLOCK, stored, SLICES * BLOCK):
            i_slot = first + o_n
            m_slot = i_slot < stored
            i_source = tl.load(p_virtual + i_slot, mask=m_slot, other=0)
            b_bias = tl.load(p_bias + i_slot, mask=m_slot, other=0.0)
            p_k = slot_rows(i_source, p_slots, p_table, s_page, s_slot, BLOCK_SIZE)
            b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m_d[None, :], other=0.0)
            b_score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
            b_score += b_bias[None, :] * 0.6931471805599453
            i_heavy = i_slot - sinks
            m_heavy = (i_heavy >= 0) & (i_heavy < heavy)
            tl.store(
                p_score + i_heavy[None, :] * ROWS + o_r[:, None], b_score, mask=m_heavy[None, :]
            )
            b_score = tl.where(m_slot[None, :], b_score, LOW)
            b_new = tl.maximum(b_peak, b_score)
            b_total *= tl.exp(b_peak - b_new)
            b_total += tl.where(m_slot[None, :], tl.exp(b_score - b_new), 0.0)
            b_peak = b_new
        b_most = tl.max(b_peak, 1)
        tl.store(p_part + i_slice * (2 * ROWS) + o_r, b_most)
        b_sum = tl.sum(b_total * tl.exp(b_peak - b_most[:, None]), 1)
        tl.store(p_part + i_slice * (2 * ROWS) + ROWS + o_r, b_sum)


@triton.jit
def choose_heavy(
    p_score, p_part, p_near, p_near_total, p_mass, p_virtual, recent, stored, incoming, sinks,
    heavy, C: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Rewrite the virtual ids of the heavy hitters and of the candidates that join the coreset."""
    o_r, o_s, o_c = tl.arange(0, ROWS), tl.arange(0, SLICES), tl.arange(0, C)
    m_c = o_c < heavy + incoming
    p_here = p_part + o_s[None, :] * (2 * ROWS) + o_r[:, None]
    b_tops, b_sums = tl.load(p_here), tl.load(p_here + ROWS)
    b_near, b_near_total = tl.load(p_near + o_r), tl.load(p_near_total + o_r)
    b_candidate = tl.load(p_virtual + sinks + o_c, mask=o_c < heavy, other=0)
    b_candidate = tl.where(o_c < heavy, b_candidate, stored + o_c - heavy + recent)
    b_most = tl.maximum(tl.max(b_tops, 1), b_near)
    b_sum = tl.sum(b_sums * tl.exp(b_tops - b_most[:, None]), 1)
    b_share = 1.0 / (b_sum + b_near_total * tl.exp(b_near - b_most))
    if C <= _CHUNK:
        b_mass = masses(p_score, 0, b_most, b_share, heavy + incoming, C)
    else:
        for first in tl.static_range(0, C, _CHUNK):
            b_mass = masses(p_score, first, b_most, b_share, heavy + incoming, _CHUNK)
            tl.store(p_mass + first + tl.arange(0, _CHUNK), b_mass)
        tl.debug_barrier()
        b_mass = tl.load(p_mass + o_c)
    # Non-negative floats sort as their bits do.
    b_bits = b_mass.to(tl.int32, bitcast=True)
    b_bits = tl.where(m_c, b_bits, -1)
    threshold, count = largest(b_bits, heavy)
    b_keep = (b_bits >= threshold).to(tl.int32)
    if count != heavy:  # ties at the threshold: the lower candidates stay
        b_tied = (b_bits == threshold).to(tl.int32)
        above = count - tl.sum(b_tied, 0)
        b_keep = tl.where((b_tied != 0) & (tl.cumsum(b_tied, 0) > heavy - above), 0, b_keep)
    b_rank = tl.cumsum(b_keep, 0)  # kept up to and with this candidate
    b_target = tl.where(b_keep != 0, sinks + b_rank - 1, stored + o_c - b_rank)
    tl.store(p_virtual + b_target, b_candidate, mask=m_c)
    tl.debug_barrier()


@triton.jit
def masses(p_score, first, b_most, b_share, count, N: tl.constexpr):
    """Attention mass of candidates [first, first + N)."""
    i_candidate = first + tl.arange(0, N)
    p_mine = p_score + i_candidate[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    b_mine = tl.load(p_mine, mask=(i_candidate < count)[:, None], other=LOW)
    return tl.sum(tl.exp(b_mine - b_most[None, :]) * b_share[None, :], 1)


@triton.jit
def largest(b_bits, heavy):
    """A threshold t with as many of int32 [C] at or above it as `heavy` asks, and that count.

    Entries are non-negative, -1 marks absent ones.  Four bits of t are found at a time.  It ends as
    soon as the count is met; if ties prevent that, t is the `heavy`-th largest entry and the count
    is larger.
    """
    threshold = tl.full([], 0, tl.int32)
    count = tl.sum((b_bits >= 0).to(tl.int32), 0)
    shift = tl.full([], 28, tl.int32)
    o_try = tl.arange(0, _TRIES)
    while (count != heavy) & (shift >= 0):
        # The highest bit of all is the sign: seven thresholds are left at the first pass.
        m_try = (o_try < 8) | (shift < 28)
        b_try = threshold + tl.where(m_try, o_try << shift, 0)
        b_count = tl.sum((b_bits[:, None] >= b_try[None, :]).to(tl.int32), 0)
        b_enough = m_try & (b_count >= heavy)
        threshold += (tl.sum(b_enough.to(tl.int32), 0) - 1) << shift
        count = tl.min(tl.where(b_enough, b_count, 1 << 30), 0)
        shift -= 4
    return threshold, count
