"""Which heavy hitters an event keeps: attention mass of the candidates, and the largest of it.

Candidates are the present heavy hitters, then the incoming tokens.  Their scores lie candidate by
candidate ([ROOM, ROWS]), so that a mass is a sum over one row, in an order of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .logits import to_logits
from .rows import ROWS, slot_rows
from .scores import LOW

#: Thresholds that one pass of `largest` tries, and its shift while they are octaves.
_TRIES, _OCTAVES = tl.constexpr(16), tl.constexpr(31)


@triton.jit
def score_stored(
    b_q, p_virtual, p_bias, slots, p_score, p_part, logits, team, stored, sinks, heavy,
    C: tl.constexpr,
):  # fmt: skip
    """A member's share of the stored slots: scores of the heavy hitters, and for each of its slices
    (every slices-th tile) the maximum and sum of exponentials, [slices, 2, ROWS] at p_part."""
    o_r, o_d, o_n = tl.arange(0, ROWS), tl.arange(0, C.padded), tl.arange(0, C.block)
    m_d = o_d < C.size
    for i_slice in range(team.member, C.slices, team.size):
        b_peak = tl.full([ROWS, C.block], LOW, tl.float32)
        b_total = tl.zeros([ROWS, C.block], tl.float32)
        for first in range(i_slice * C.block, stored, C.slices * C.block):
            i_slot = first + o_n
            m_slot = i_slot < stored
            i_source = tl.load(p_virtual + i_slot, mask=m_slot, other=0)
            b_bias = tl.load(p_bias + i_slot, mask=m_slot, other=0.0)
            p_k = slot_rows(i_source, slots, C.block_size)
            b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m_d[None, :], other=0.0)
            b_score = to_logits(tl.dot(b_q, tl.trans(b_k), input_precision="tf32x3"), logits, C)
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
def weigh(
    p_score, p_part, p_near, p_near_total, p_bits, candidates, team, C: tl.constexpr
):  # fmt: skip
    """A member's share of the candidates' attention masses, to p_bits: int32, -1 up to a multiple
    of `C.candidates`, `C.share` at a time.  Non-negative floats sort as their bits do."""
    o_r, o_s, o_c = tl.arange(0, ROWS), tl.arange(0, C.slices), tl.arange(0, C.share)
    p_here = p_part + o_s[None, :] * (2 * ROWS) + o_r[:, None]
    b_tops, b_sums = tl.load(p_here), tl.load(p_here + ROWS)
    b_near, b_near_total = tl.load(p_near + o_r), tl.load(p_near_total + o_r)
    b_most = tl.maximum(tl.max(b_tops, 1), b_near)
    b_sum = tl.sum(b_sums * tl.exp(b_tops - b_most[:, None]), 1)
    b_share = 1.0 / (b_sum + b_near_total * tl.exp(b_near - b_most))
    end = tl.cdiv(candidates, C.candidates) * C.candidates
    for first in range(team.member * C.share, end, team.size * C.share):
        i_candidate = first + o_c
        p_mine = p_score + i_candidate[:, None] * ROWS + o_r[None, :]
        b_mine = tl.load(p_mine, mask=(i_candidate < candidates)[:, None], other=LOW)
        b_mass = tl.sum(tl.exp(b_mine - b_most[None, :]) * b_share[None, :], 1)
        b_bits = tl.where(i_candidate < candidates, b_mass.to(tl.int32, bitcast=True), -1)
        tl.store(p_bits + i_candidate, b_bits)


@triton.jit
def choose_heavy(
    p_bits, p_virtual, recent, stored, incoming, sinks, heavy, C: tl.constexpr
):  # fmt: skip
    """Rewrite the virtual ids of the heavy hitters and of the candidates that join the coreset.

    p_bits: the candidates' masses (`weigh`); those of the first `C.candidates` stay in registers.
    """
    o_c = tl.arange(0, C.candidates)
    candidates = heavy + incoming
    b_bits = tl.load(p_bits + o_c)
    threshold, count = largest(b_bits, p_bits, candidates, heavy, C)
    # Ties at the threshold: the lower candidates stay.
    room = heavy
    if count != heavy:
        room -= tl.sum((b_bits > threshold).to(tl.int32), 0)
        for first in range(C.candidates, candidates, C.candidates):
            room -= tl.sum((tl.load(p_bits + first + o_c) > threshold).to(tl.int32), 0)
    tied = room * 0
    kept = tied
    for first in range(0, candidates, C.candidates):
        if first > 0:
            b_bits = tl.load(p_bits + first + o_c)
        i_candidate = first + o_c
        b_entry = tl.load(p_virtual + sinks + i_candidate, mask=i_candidate < heavy, other=0)
        b_entry = tl.where(i_candidate < heavy, b_entry, stored + i_candidate - heavy + recent)
        b_keep = (b_bits >= threshold).to(tl.int32)
        if count != heavy:
            b_tied = (b_bits == threshold).to(tl.int32)
            b_late = tied + tl.cumsum(b_tied, 0) > room
            b_keep = tl.where((b_tied != 0) & b_late, 0, b_keep)
            tied += tl.sum(b_tied, 0)
        b_rank = kept + tl.cumsum(b_keep, 0)  # kept up to and with this candidate
        kept += tl.sum(b_keep, 0)
        b_target = tl.where(b_keep != 0, sinks + b_rank - 1, stored + i_candidate - b_rank)
        # A candidate moves down among the heavy hitters, or behind all of them.
        tl.debug_barrier()
        tl.store(p_virtual + b_target, b_entry, mask=i_candidate < candidates)
    tl.debug_barrier()


@triton.jit
def largest(b_bits, p_bits, candidates, heavy, C: tl.constexpr):
    """A threshold t with as many masses at or above it as `heavy` asks, and that count.

    b_bits: the first `C.candidates`; p_bits: all others.  The first pass finds t's octave, if it
    lies in [2^-13, 2), further ones four bits of t at a time.  It ends as soon as the count is met;
    if ties prevent that, t is the `heavy`-th largest entry and the count is larger.
    """
    o_c, o_try = tl.arange(0, C.candidates), tl.arange(0, _TRIES)
    threshold = tl.full([], 0, tl.int32)
    count = candidates + threshold
    shift = tl.full([], _OCTAVES, tl.int32)
    b_try = tl.where(o_try > 0, (113 + o_try) << 23, 0)
    while (count != heavy) & (shift >= 0):
        b_count = tl.sum((b_bits[:, None] >= b_try[None, :]).to(tl.int32), 0)
        for first in range(C.candidates, candidates, C.candidates):
            b_more = tl.load(p_bits + first + o_c)
            b_count += tl.sum((b_more[:, None] >= b_try[None, :]).to(tl.int32), 0)
        # The last try that enough masses reach: counts fall along the tries.
        b_key = tl.where(b_count >= heavy, (b_count + 1) * _TRIES - 1 - o_try, 1 << 30)
        key = tl.min(b_key, 0)
        count = key // _TRIES
        i_try = _TRIES - 1 - key % _TRIES
        octave = tl.where(i_try > 0, (113 + i_try) << 23, 0)
        inside = (i_try > 0) & (i_try < _TRIES - 1)
        octave = tl.where(inside | (count == heavy), octave, 0)
        threshold += tl.where(shift == _OCTAVES, octave, i_try << shift)
        # The last bits of an octave are tried together with known ones.
        following = tl.where(shift > 0, tl.maximum(shift - 4, 0), -1)
        shift = tl.where(shift == _OCTAVES, tl.where(inside, 19, 28), following)
        b_try = threshold + (o_try << tl.maximum(shift, 0))
        b_try = tl.where((o_try < 8) | (shift < 28), b_try, 0x7FFFFFFF)
    return threshold, count
