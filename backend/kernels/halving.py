"""Kernel halving on the device: pair differences of a tile by matrix products, then the walk.

A tile is PAIRS pairs.  The S x S kernel matrix is never stored: a tile's psi comes from all earlier
tiles (left-looking), whose products are computed again, and only the PAIRS x PAIRS differences of
the tile itself go to scratch for the walk, which is sequential.  All arithmetic is fp32; products
of bf16 and fp16 entries are exact in the tensor cores' fp32 accumulators.

Source: Low-Rank Thinning (arXiv 2502.12063); `reference.halving` is the oracle.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import mix

GAUSSIAN, EXPONENTIAL = 0, 1


@triton.jit
def kernel_tile(
    b_ki, b_kj, b_vi, b_vj, b_ni, b_nj, b_mi, b_mj, mean2, bound2, shift, scale,
    KIND: tl.constexpr,
):  # fmt: skip
    """kappa of points i and j, fp32 [P, P]: keys and values [P, d], squared norms n [P].

    `exponential`: on keys centred by their mean, through m = <k, mean> [P] and mean2 = |mean|^2.
    """
    b_dot = tl.dot(b_ki, tl.trans(b_kj), input_precision="ieee")
    b_weight = tl.dot(b_vi, tl.trans(b_vj), input_precision="ieee") + bound2
    if KIND == 0:
        b_distance = tl.maximum(b_ni[:, None] + b_nj[None, :] - 2.0 * b_dot, 0.0)
        b_kappa = tl.exp(-0.5 * scale * b_distance)
    else:
        b_centred = b_dot - b_mi[:, None] - b_mj[None, :] + mean2
        b_kappa = tl.exp(tl.minimum((b_centred - shift) * scale, 0.0))
    return b_kappa * b_weight


@triton.jit
def load_points(p_k, p_v, m, p_mean, o_d, m_d, KIND: tl.constexpr):
    """Keys and values [P, d] of rows p_k, p_v [P], squared norms and products with the mean."""
    m_row = m[:, None] & m_d[None, :]
    b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m_row, other=0.0)
    b_v = tl.load(p_v[:, None] + o_d[None, :], mask=m_row, other=0.0)
    b_wide = b_k.to(tl.float32)
    b_n = tl.sum(b_wide * b_wide, 1)
    b_m = b_n
    if KIND != 0:
        b_mean = tl.load(p_mean + o_d, mask=m_d, other=0.0)
        b_m = tl.sum(b_wide * b_mean[None, :], 1)
    return b_k, b_v, b_n, b_m


@triton.jit
def walk_half(
    p_delta,  # fp32 [G, P, P]: pair differences
    p_tau,  # fp32 [G, P]: thresholds (exponential)
    b_near,  # fp32 [G, HALF]: psi of the pairs to decide
    b_far,  # fp32 [G, HALF]: psi of the second half's pairs, while the first is decided
    b_key,  # uint32 [G]: bits of (event, operation, stream)
    i_first,  # pair index of the tile's first pair
    G: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, SECOND: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The self-balancing walk over half a tile of G groups -> positive signs [G, HALF], b_far.

    Half a tile is as wide as a warp, so that `pick` is one shuffle and every lane knows each sign.
    Four steps share a round of shuffles: the entries of D among the four bring the later psi up to
    date.  Rows of absent groups are read as they are and never used.
    """
    o_lane, o_g = tl.arange(0, HALF), tl.arange(0, G)
    first = SECOND * HALF
    o_near = o_lane[None, :] + first
    # + where psi < tau; at psi = 0 the tie bit decides.
    b_bits = mix(b_key[:, None], tl.zeros([G, HALF], tl.uint32) + (i_first + o_near))
    b_tie = (b_bits & 1).to(tl.int32)
    b_tau = tl.zeros([G, HALF], tl.float32)
    if KIND != 0:
        b_scale = tl.load(p_tau + o_g[:, None] * P + o_near)
        # A positive threshold is compared as it is; only a zero one falls back to the tie bit.
        b_tie = tl.where(b_scale > 0.0, 0, b_tie)
        b_ticket = 2.0 * ((b_bits >> 8).to(tl.float32) * 5.9604644775390625e-08) - 1.0
        b_tau = b_ticket * b_scale
    b_sign = tl.zeros([G, HALF], tl.int32)
    p_near = p_delta + o_g[:, None] * (P * P) + first * P + o_near
    n0, n1 = tl.load(p_near), tl.load(p_near + P)
    n2, n3 = tl.load(p_near + 2 * P), tl.load(p_near + 3 * P)
    f0, f1, f2, f3 = n0, n1, n2, n3
    if SECOND == 0:
        f0, f1 = tl.load(p_near + HALF), tl.load(p_near + HALF + P)
        f2, f3 = tl.load(p_near + HALF + 2 * P), tl.load(p_near + HALF + 3 * P)
    for j in range(0, HALF, 4):
        # The next block's rows are on their way while this one is decided.
        p_next = p_near + tl.minimum(j + 4, HALF - 4) * P
        x0, x1 = tl.load(p_next), tl.load(p_next + P)
        x2, x3 = tl.load(p_next + 2 * P), tl.load(p_next + 3 * P)
        y0, y1, y2, y3 = x0, x1, x2, x3
        if SECOND == 0:
            y0, y1 = tl.load(p_next + HALF), tl.load(p_next + HALF + P)
            y2, y3 = tl.load(p_next + HALF + 2 * P), tl.load(p_next + HALF + 3 * P)
        i0 = tl.zeros([G, HALF], tl.int32) + j
        i1, i2, i3 = i0 + 1, i0 + 2, i0 + 3
        psi0, psi1 = tl.gather(b_near, i0, 1), tl.gather(b_near, i1, 1)
        psi2, psi3 = tl.gather(b_near, i2, 1), tl.gather(b_near, i3, 1)
        pos0 = positive(psi0, b_tau, b_tie, i0, KIND)
        s0 = tl.where(pos0, 1.0, -1.0)
        psi1 += s0 * tl.gather(n0, i1, 1)
        psi2 += s0 * tl.gather(n0, i2, 1)
        psi3 += s0 * tl.gather(n0, i3, 1)
        pos1 = positive(psi1, b_tau, b_tie, i1, KIND)
        s1 = tl.where(pos1, 1.0, -1.0)
        psi2 += s1 * tl.gather(n1, i2, 1)
        psi3 += s1 * tl.gather(n1, i3, 1)
        pos2 = positive(psi2, b_tau, b_tie, i2, KIND)
        s2 = tl.where(pos2, 1.0, -1.0)
        psi3 += s2 * tl.gather(n2, i3, 1)
        pos3 = positive(psi3, b_tau, b_tie, i3, KIND)
        s3 = tl.where(pos3, 1.0, -1.0)
        b_near = b_near + s0 * n0 + s1 * n1 + s2 * n2 + s3 * n3
        if SECOND == 0:
            b_far = b_far + s0 * f0 + s1 * f1 + s2 * f2 + s3 * f3
        b_step = o_lane[None, :] - j
        b_sign = tl.where((b_step == 0) & pos0, 1, b_sign)
        b_sign = tl.where((b_step == 1) & pos1, 1, b_sign)
        b_sign = tl.where((b_step == 2) & pos2, 1, b_sign)
        b_sign = tl.where((b_step == 3) & pos3, 1, b_sign)
        n0, n1, n2, n3, f0, f1, f2, f3 = x0, x1, x2, x3, y0, y1, y2, y3
    return b_sign, b_far


@triton.jit
def positive(psi, b_tau, b_tie, i, KIND: tl.constexpr):
    """The sign of step `i`, known to every lane."""
    tie = tl.gather(b_tie, i, 1) != 0
    if KIND != 0:
        return (psi < tl.gather(b_tau, i, 1)) | ((psi == 0.0) & tie)
    else:
        return (psi < 0.0) | ((psi == 0.0) & tie)
