"""Kernel halving on the device: pair differences of a tile by matrix products, then the walk.

A tile is P pairs.  The S x S kernel matrix is never stored: only the P x P differences of a tile go
to scratch for the walk, which is sequential.  Groups of one tile take `differences`, several groups
at a time.  Longer ones, and those of the published kernel, take `long_groups.py`.  All arithmetic
is fp32; products of bf16 and fp16 entries are exact in the tensor cores' fp32 accumulators.

Source: Low-Rank Thinning (arXiv 2502.12063); `reference.halving` is the oracle.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from express_vllm.rng import STREAM_COMPLEMENT, STREAM_SIGN

from .columns import OP
from .constants import EXPONENTIAL as _EXPONENTIAL
from .rows import mix, slot_rows

EXPONENTIAL = tl.constexpr(_EXPONENTIAL)
_SIGN, _COMPLEMENT = tl.constexpr(STREAM_SIGN), tl.constexpr(STREAM_COMPLEMENT)


class Scratch(NamedTuple):
    """A program's own, of G groups: pointers to fp32."""

    delta: Any  # [G, P, P]: pair differences of a tile
    tau: Any  # [G, P]: its thresholds (exponential)
    psi: Any  # [G, P]
    mean: Any  # [d]: mean key of a group
    sign: Any  # signs of a long group's tiles so far


class Entries(NamedTuple):
    """Source indices by virtual id: those below `base` are the program's own, a halving's outputs
    are the team's."""

    virtual: Any
    output: Any
    base: Any


class Groups(NamedTuple):
    """Groups [G] that a program halves side by side."""

    here: Any  # whether there is one
    length: Any
    inputs: Any  # offset into the ids
    output: Any  # first id
    key: Any  # uint32: bits of (event, operation, stream of signs)
    flip: Any  # the complementary half stays


@triton.jit
def load_groups(op, count, event_key, C: tl.constexpr):
    """The first `count` operations from `op` on, at most G."""
    G: tl.constexpr = C.halvings
    o_g = tl.arange(0, G)
    m_g = o_g < count
    p_op = op + o_g * OP.words
    b_length = tl.load(p_op + OP.length, mask=m_g, other=0)
    b_number = tl.load(p_op + OP.number, mask=m_g, other=0).to(tl.uint32)
    b_inputs = tl.load(p_op + OP.inputs, mask=m_g, other=0)
    b_output = tl.load(p_op + OP.output, mask=m_g, other=0)
    b_op = mix(tl.zeros([G], tl.uint32) + event_key, b_number)
    b_key = mix(b_op, tl.full([G], _SIGN, tl.uint32))
    b_flip = mix(b_op, tl.full([G], _COMPLEMENT, tl.uint32))
    b_flip = (mix(b_flip, tl.zeros([G], tl.uint32)) & 1).to(tl.int32)
    return Groups(m_g, b_length, b_inputs, b_output, b_key, b_flip)


@triton.jit
def entry(b_id, entries, m):
    """Source indices of virtual ids."""
    p_output = entries.output + (b_id - entries.base)
    p_own = tl.where(b_id < entries.base, entries.virtual + b_id, p_output)
    return tl.load(p_own, mask=m, other=0)


@triton.jit
def points(op, count, ids, C: tl.constexpr):
    """Virtual ids of the points of up to `C.together` groups of one tile each, -1 for absent ones:
    the groups' points lie one after the other."""
    o_s = tl.arange(0, C.together * 2 * C.pairs)
    i_group, i_point = o_s // (2 * C.pairs), o_s % (2 * C.pairs)
    p_op = op + i_group * OP.words
    b_length = tl.load(p_op + OP.length, mask=i_group < count, other=0)
    b_inputs = tl.load(p_op + OP.inputs, mask=i_group < count, other=0)
    return tl.load(ids + b_inputs + i_point, mask=i_point < b_length, other=-1)


@triton.jit
def differences(
    b_id, count, entries, slots, p_delta, root, C: tl.constexpr
):  # fmt: skip
    """Pair differences fp32 [B, P, P] of the groups of `points`, for the Gaussian kernel.

    The groups share one matrix product: what it computes between groups is thrown away.

    D_ij = (k(2i, 2j) - k(2i + 1, 2j)) - (k(2i, 2j + 1) - k(2i + 1, 2j + 1)), as in the reference:
    a sum of two numbers does not depend on their order.
    """
    P: tl.constexpr = C.pairs
    B: tl.constexpr = C.together
    S: tl.constexpr = B * 2 * P
    o_d, o_p = tl.arange(0, C.padded), tl.arange(0, B * P)
    m = b_id >= 0
    p_k = slot_rows(entry(b_id, entries, m), slots, C.block_size)
    m_row = m[:, None] & (o_d < C.size)[None, :]
    b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m_row, other=0.0)
    b_v = tl.load(p_k[:, None] + slots.value + o_d[None, :], mask=m_row, other=0.0)
    b_wide = b_k.to(tl.float32)
    b_n = tl.sum(b_wide * b_wide, 1)
    b_bound = tl.max(tl.reshape(tl.max(tl.abs(b_v.to(tl.float32)), 1), [B, 2 * P]), 1)
    b_bound2 = tl.broadcast_to((b_bound * b_bound)[:, None], [B, 2 * P])
    b_bound2 = tl.reshape(b_bound2, [S])
    PRECISION: tl.constexpr = "tf32x3" if C.padded <= 128 else "ieee"
    b_dot = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
    b_weight = tl.dot(b_v, tl.trans(b_v), input_precision=PRECISION)
    b_distance = tl.maximum(b_n[:, None] + b_n[None, :] - 2.0 * b_dot, 0.0)
    b_kappa = tl.exp(-0.5 * root * b_distance) * (b_weight + b_bound2[:, None])
    b_sign = tl.where(tl.arange(0, 2) == 0, 1.0, -1.0)
    b_rows = tl.sum(tl.reshape(b_kappa, [B * P, 2, S]) * b_sign[None, :, None], 1)
    b_delta = tl.sum(tl.reshape(b_rows, [B * P, B * P, 2]) * b_sign[None, None, :], 2)
    # Pairs of two groups have no difference to keep.
    m_own = (o_p // P)[:, None] == (o_p // P)[None, :]
    tl.store(
        p_delta + o_p[:, None] * P + (o_p % P)[None, :], b_delta,
        mask=m_own & (o_p // P < count)[:, None],
    )  # fmt: skip


@triton.jit
def thresholds(scratch, b_key, i_first, C: tl.constexpr):
    """Of a tile's pairs: + where psi < tau; at psi = 0 the tie bit decides -> tau, tie [G, P]."""
    o_lane, o_g = tl.arange(0, C.pairs), tl.arange(0, C.halvings)
    b_index = tl.zeros([C.halvings, C.pairs], tl.uint32) + (i_first + o_lane[None, :])
    b_bits = mix(b_key[:, None], b_index)
    b_tie = (b_bits & 1).to(tl.int32)
    b_tau = tl.zeros([C.halvings, C.pairs], tl.float32)
    if C.kind == EXPONENTIAL:
        b_scale = tl.load(scratch.tau + o_g[:, None] * C.pairs + o_lane[None, :])
        # A positive threshold is compared as it is; only a zero one falls back to the tie bit.
        b_tie = tl.where(b_scale > 0.0, 0, b_tie)
        b_ticket = 2.0 * ((b_bits >> 8).to(tl.float32) * 5.9604644775390625e-08) - 1.0
        b_tau = b_ticket * b_scale
    return b_tau, b_tie


@triton.jit
def walk(
    scratch,  # pair differences, and thresholds of the exponential kernel
    b_psi,  # fp32 [G, P]: psi of the tile's pairs
    b_key,  # uint32 [G]: bits of (event, operation, stream)
    i_first,  # pair index of the tile's first pair
    C: tl.constexpr,
):
    """The self-balancing walk over a tile of G groups -> positive signs [G, P].

    A tile's pairs are as wide as a warp, so that `gather` is one shuffle and every lane knows each
    sign.  Four steps share a round of shuffles: the entries of D among the four bring the later psi
    up to date.  All steps are unrolled, so that rows are on their way while earlier ones are
    decided.  Rows of absent groups are read as they are, never used.
    """
    G: tl.constexpr = C.halvings
    P: tl.constexpr = C.pairs
    o_lane, o_g = tl.arange(0, P), tl.arange(0, G)
    b_tau, b_tie = thresholds(scratch, b_key, i_first, C)
    b_sign = tl.zeros([G, P], tl.int32)
    p_rows = scratch.delta + o_g[:, None] * (P * P) + o_lane[None, :]
    for j in tl.static_range(0, P, 4):
        p_row = p_rows + j * P
        n0, n1 = tl.load(p_row), tl.load(p_row + P)
        n2, n3 = tl.load(p_row + 2 * P), tl.load(p_row + 3 * P)
        i0 = tl.full([G, P], j, tl.int32)
        i1, i2, i3 = i0 + 1, i0 + 2, i0 + 3
        psi0, psi1 = tl.gather(b_psi, i0, 1), tl.gather(b_psi, i1, 1)
        psi2, psi3 = tl.gather(b_psi, i2, 1), tl.gather(b_psi, i3, 1)
        pos0 = positive(psi0, b_tau, b_tie, i0, C)
        s0 = tl.where(pos0, 1.0, -1.0)
        psi1 += s0 * tl.gather(n0, i1, 1)
        psi2 += s0 * tl.gather(n0, i2, 1)
        psi3 += s0 * tl.gather(n0, i3, 1)
        pos1 = positive(psi1, b_tau, b_tie, i1, C)
        s1 = tl.where(pos1, 1.0, -1.0)
        psi2 += s1 * tl.gather(n1, i2, 1)
        psi3 += s1 * tl.gather(n1, i3, 1)
        pos2 = positive(psi2, b_tau, b_tie, i2, C)
        s2 = tl.where(pos2, 1.0, -1.0)
        psi3 += s2 * tl.gather(n2, i3, 1)
        pos3 = positive(psi3, b_tau, b_tie, i3, C)
        s3 = tl.where(pos3, 1.0, -1.0)
        b_psi = b_psi + s0 * n0 + s1 * n1 + s2 * n2 + s3 * n3
        b_step = o_lane[None, :] - j
        b_sign = tl.where((b_step == 0) & pos0, 1, b_sign)
        b_sign = tl.where((b_step == 1) & pos1, 1, b_sign)
        b_sign = tl.where((b_step == 2) & pos2, 1, b_sign)
        b_sign = tl.where((b_step == 3) & pos3, 1, b_sign)
    return b_sign


@triton.jit
def positive(psi, b_tau, b_tie, i, C: tl.constexpr):
    """The sign of step `i`, known to every lane."""
    tie = tl.gather(b_tie, i, 1) != 0
    if C.kind == EXPONENTIAL:
        return (psi < tl.gather(b_tau, i, 1)) | ((psi == 0.0) & tie)
    else:
        return (psi < 0.0) | ((psi == 0.0) & tie)


@triton.jit
def keep(
    b_sign, i_tile, groups, ids, entries, scratch, C: tl.constexpr
):  # fmt: skip
    """Of pair i the point 2 i + kept stays, as output i; a tile of signs [G, P]."""
    o_lane = tl.arange(0, C.pairs)
    if C.long:
        p_sign = scratch.sign + i_tile * C.pairs + o_lane[None, :]
        tl.store(p_sign, 2.0 * b_sign.to(tl.float32) - 1.0, mask=groups.here[:, None])
    i_pair = i_tile * C.pairs + o_lane
    b_stay = (b_sign ^ 1) ^ groups.flip[:, None]
    m_out = groups.here[:, None] & (i_pair[None, :] < groups.length[:, None] // 2)
    p_inputs = ids + groups.inputs
    b_id = tl.load(p_inputs[:, None] + 2 * i_pair[None, :] + b_stay, mask=m_out, other=0)
    b_entry = entry(b_id, entries, m_out)
    p_output = entries.output + (groups.output - entries.base)[:, None]
    tl.store(p_output + i_pair[None, :], b_entry, mask=m_out)
