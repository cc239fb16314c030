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

from express_vllm.rng import STREAM_SIGN

from .rows import mix

GAUSSIAN, EXPONENTIAL = 0, 1
#: Steps of the walk whose psi values are fetched with one round of shuffles.
STEPS = tl.constexpr(4)
_SIGN = tl.constexpr(STREAM_SIGN)


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
    """Keys and values [P, d] of rows p_k, p_v [P], their squared norms and products with the mean."""
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
def walk_step(psi, tau, tie):
    """The sign of one pair: +1 where the random threshold exceeds psi; `tie` decides at psi = 0."""
    return (psi < tau) | ((psi == 0.0) & (tie != 0))


@triton.jit
def pick(b_psi, o_lane, i):
    """Column i of [G, P] -> [G]."""
    return tl.sum(tl.where(o_lane[None, :] == i, b_psi, 0.0), 1)


@triton.jit
def walk(
    p_delta,  # fp32 [G, P, P]: pair differences
    p_tau,  # fp32 [G, P]: thresholds (exponential)
    b_psi,  # fp32 [G, P]: psi left by earlier tiles
    b_key,  # uint32 [G]: bits of (event, operation, stream)
    m_group,  # [G]
    i_first,  # pair index of the tile's first pair
    G: tl.constexpr,
    P: tl.constexpr,
    KIND: tl.constexpr,
):
    """The self-balancing walk over one tile of G groups at once -> positive signs [G, P]."""
    o_g = tl.arange(0, G)
    o_lane = tl.arange(0, P)
    m_lane = m_group[:, None] & (o_lane[None, :] < P)
    b_sign = tl.zeros([G, P], tl.int32)
    p_group = p_delta + o_g * (P * P)
    for i in range(0, P, STEPS):
        # Everything that no sign of this block decides is loaded first: rows and in-block entries.
        p_row = p_group + i * P
        b_row0 = tl.load(p_row[:, None] + o_lane[None, :], mask=m_lane, other=0.0)
        b_row1 = tl.load(p_row[:, None] + P + o_lane[None, :], mask=m_lane, other=0.0)
        b_row2 = tl.load(p_row[:, None] + 2 * P + o_lane[None, :], mask=m_lane, other=0.0)
        b_row3 = tl.load(p_row[:, None] + 3 * P + o_lane[None, :], mask=m_lane, other=0.0)
        d01 = tl.load(p_row + i + 1, mask=m_group, other=0.0)
        d02 = tl.load(p_row + i + 2, mask=m_group, other=0.0)
        d03 = tl.load(p_row + i + 3, mask=m_group, other=0.0)
        d12 = tl.load(p_row + P + i + 2, mask=m_group, other=0.0)
        d13 = tl.load(p_row + P + i + 3, mask=m_group, other=0.0)
        d23 = tl.load(p_row + 2 * P + i + 3, mask=m_group, other=0.0)
        i_pair = tl.zeros([G], tl.uint32) + (i_first + i)
        bit0 = mix(b_key, i_pair)
        bit1 = mix(b_key, i_pair + 1)
        bit2 = mix(b_key, i_pair + 2)
        bit3 = mix(b_key, i_pair + 3)
        tau0 = tl.zeros([G], tl.float32)
        tau1 = tau0
        tau2 = tau0
        tau3 = tau0
        tie0 = bit0 & 1
        tie1 = bit1 & 1
        tie2 = bit2 & 1
        tie3 = bit3 & 1
        if KIND != 0:
            tau0 = tl.load(p_tau + o_g * P + i, mask=m_group, other=0.0)
            tau1 = tl.load(p_tau + o_g * P + i + 1, mask=m_group, other=0.0)
            tau2 = tl.load(p_tau + o_g * P + i + 2, mask=m_group, other=0.0)
            tau3 = tl.load(p_tau + o_g * P + i + 3, mask=m_group, other=0.0)
            # A positive threshold is compared as it is; only a zero one falls back to the tie bit.
            tie0 = tl.where(tau0 > 0.0, 0, tie0)
            tie1 = tl.where(tau1 > 0.0, 0, tie1)
            tie2 = tl.where(tau2 > 0.0, 0, tie2)
            tie3 = tl.where(tau3 > 0.0, 0, tie3)
            tau0 = (2.0 * ((bit0 >> 8).to(tl.float32) * 5.9604644775390625e-08) - 1.0) * tau0
            tau1 = (2.0 * ((bit1 >> 8).to(tl.float32) * 5.9604644775390625e-08) - 1.0) * tau1
            tau2 = (2.0 * ((bit2 >> 8).to(tl.float32) * 5.9604644775390625e-08) - 1.0) * tau2
            tau3 = (2.0 * ((bit3 >> 8).to(tl.float32) * 5.9604644775390625e-08) - 1.0) * tau3
        psi0 = pick(b_psi, o_lane, i)
        psi1 = pick(b_psi, o_lane, i + 1)
        psi2 = pick(b_psi, o_lane, i + 2)
        psi3 = pick(b_psi, o_lane, i + 3)
        pos0 = walk_step(psi0, tau0, tie0)
        s0 = tl.where(pos0, 1.0, -1.0)
        psi1 += s0 * d01
        psi2 += s0 * d02
        psi3 += s0 * d03
        pos1 = walk_step(psi1, tau1, tie1)
        s1 = tl.where(pos1, 1.0, -1.0)
        psi2 += s1 * d12
        psi3 += s1 * d13
        pos2 = walk_step(psi2, tau2, tie2)
        s2 = tl.where(pos2, 1.0, -1.0)
        psi3 += s2 * d23
        pos3 = walk_step(psi3, tau3, tie3)
        s3 = tl.where(pos3, 1.0, -1.0)
        b_psi += s0[:, None] * b_row0
        b_psi += s1[:, None] * b_row1
        b_psi += s2[:, None] * b_row2
        b_psi += s3[:, None] * b_row3
        b_sign = tl.where(o_lane[None, :] == i, pos0[:, None].to(tl.int32), b_sign)
        b_sign = tl.where(o_lane[None, :] == i + 1, pos1[:, None].to(tl.int32), b_sign)
        b_sign = tl.where(o_lane[None, :] == i + 2, pos2[:, None].to(tl.int32), b_sign)
        b_sign = tl.where(o_lane[None, :] == i + 3, pos3[:, None].to(tl.int32), b_sign)
    return b_sign
