"""Kernel halving on the device: pair differences of a tile by matrix products, then the walk.

A tile is P pairs.  The S x S kernel matrix is never stored: only the P x P differences of a tile go
to scratch for the walk, which is sequential.  Groups of one tile take `differences`, several groups
at a time.  Longer ones, and those of the published kernel, take `long_tile`: a tile's psi comes
from all earlier tiles (left-looking), whose products are computed again.  All arithmetic is fp32;
products of bf16 and fp16 entries are exact in the tensor cores' fp32 accumulators.

Source: Low-Rank Thinning (arXiv 2502.12063); `reference.halving` is the oracle.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .columns import OP
from .rows import mix, slot_rows, wide

GAUSSIAN, EXPONENTIAL = 0, 1


@triton.jit
def kernel_tile(
    b_ki, b_kj, b_vi, b_vj, b_ni, b_nj, b_mi, b_mj, mean2, bound2, shift, scale,
    KIND: tl.constexpr,
):  # fmt: skip
    """kappa of points i and j, fp32 [P, P]: keys and values [P, d], squared norms n [P].

    `exponential`: on keys centred by their mean, through m = <k, mean> [P] and mean2 = |mean|^2.
    """
    # The tensor cores' parts of wider fp32 rows do not fit in shared memory.
    PRECISION: tl.constexpr = "tf32x3" if b_ki.shape[1] <= 128 else "ieee"
    b_dot = tl.dot(b_ki, tl.trans(b_kj), input_precision=PRECISION)
    b_weight = tl.dot(b_vi, tl.trans(b_vj), input_precision=PRECISION) + bound2
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
def walk(
    p_delta,  # fp32 [G, P, P]: pair differences
    p_tau,  # fp32 [G, P]: thresholds (exponential)
    b_psi,  # fp32 [G, P]: psi of the tile's pairs
    b_key,  # uint32 [G]: bits of (event, operation, stream)
    i_first,  # pair index of the tile's first pair
    G: tl.constexpr, P: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The self-balancing walk over a tile of G groups -> positive signs [G, P].

    A tile's pairs are as wide as a warp, so that `gather` is one shuffle and every lane knows each
    sign.  Four steps share a round of shuffles: the entries of D among the four bring the later psi
    up to date.  All steps are unrolled, so that rows are on their way while earlier ones are
    decided.  Rows of absent groups are read as they are, never used.
    """
    o_lane, o_g = tl.arange(0, P), tl.arange(0, G)
    # + where psi < tau; at psi = 0 the tie bit decides.
    b_bits = mix(b_key[:, None], tl.zeros([G, P], tl.uint32) + (i_first + o_lane[None, :]))
    b_tie = (b_bits & 1).to(tl.int32)
    b_tau = tl.zeros([G, P], tl.float32)
    if KIND != 0:
        b_scale = tl.load(p_tau + o_g[:, None] * P + o_lane[None, :])
        # A positive threshold is compared as it is; only a zero one falls back to the tie bit.
        b_tie = tl.where(b_scale > 0.0, 0, b_tie)
        b_ticket = 2.0 * ((b_bits >> 8).to(tl.float32) * 5.9604644775390625e-08) - 1.0
        b_tau = b_ticket * b_scale
    b_sign = tl.zeros([G, P], tl.int32)
    p_rows = p_delta + o_g[:, None] * (P * P) + o_lane[None, :]
    for j in tl.static_range(0, P, 4):
        p_row = p_rows + j * P
        n0, n1 = tl.load(p_row), tl.load(p_row + P)
        n2, n3 = tl.load(p_row + 2 * P), tl.load(p_row + 3 * P)
        i0 = tl.full([G, P], j, tl.int32)
        i1, i2, i3 = i0 + 1, i0 + 2, i0 + 3
        psi0, psi1 = tl.gather(b_psi, i0, 1), tl.gather(b_psi, i1, 1)
        psi2, psi3 = tl.gather(b_psi, i2, 1), tl.gather(b_psi, i3, 1)
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
        b_psi = b_psi + s0 * n0 + s1 * n1 + s2 * n2 + s3 * n3
        b_step = o_lane[None, :] - j
        b_sign = tl.where((b_step == 0) & pos0, 1, b_sign)
        b_sign = tl.where((b_step == 1) & pos1, 1, b_sign)
        b_sign = tl.where((b_step == 2) & pos2, 1, b_sign)
        b_sign = tl.where((b_step == 3) & pos3, 1, b_sign)
    return b_sign


@triton.jit
def positive(psi, b_tau, b_tie, i, KIND: tl.constexpr):
    """The sign of step `i`, known to every lane."""
    tie = tl.gather(b_tie, i, 1) != 0
    if KIND != 0:
        return (psi < tl.gather(b_tau, i, 1)) | ((psi == 0.0) & tie)
    else:
        return (psi < 0.0) | ((psi == 0.0) & tie)


@triton.jit
def entry(b_id, p_virtual, p_output, base, m):
    """Source indices of virtual ids: a halving's outputs are shared, the others a program's own."""
    p_own = tl.where(b_id < base, p_virtual + b_id, p_output + (b_id - base))
    return tl.load(p_own, mask=m, other=0)


@triton.jit
def keep(
    b_sign, b_flip, i_tile, b_length, p_inputs, b_output, m_g, p_virtual, p_output, base, p_sign,
    G: tl.constexpr, P: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Of pair i the point 2 i + kept stays, as output i; a tile of signs [G, P]."""
    o_lane = tl.arange(0, P)
    if LONG:
        o_sign = i_tile * P + o_lane[None, :]
        tl.store(p_sign + o_sign, 2.0 * b_sign.to(tl.float32) - 1.0, mask=m_g[:, None])
    i_pair = i_tile * P + o_lane
    b_stay = (b_sign ^ 1) ^ b_flip[:, None]
    m_out = m_g[:, None] & (i_pair[None, :] < b_length[:, None] // 2)
    b_id = tl.load(p_inputs[:, None] + 2 * i_pair[None, :] + b_stay, mask=m_out, other=0)
    b_entry = entry(b_id, p_virtual, p_output, base, m_out)
    tl.store(p_output + b_output[:, None] + i_pair[None, :], b_entry, mask=m_out)


@triton.jit
def points(op, count, ids, P: tl.constexpr, B: tl.constexpr):
    """Virtual ids [B * 2 P] of the points of up to B groups of one tile each, -1 for absent ones:
    the groups' points lie one after the other."""
    o_s = tl.arange(0, B * 2 * P)
    i_group, i_point = o_s // (2 * P), o_s % (2 * P)
    p_op = op + i_group * OP.words
    b_length = tl.load(p_op + OP.length, mask=i_group < count, other=0)
    b_inputs = tl.load(p_op + OP.inputs, mask=i_group < count, other=0)
    return tl.load(ids + b_inputs + i_point, mask=i_point < b_length, other=-1)


@triton.jit
def differences(
    b_id, count, p_virtual, p_output, base, p_slots, p_table, s_value, s_page, s_slot, p_delta,
    root,
    D: tl.constexpr, D_PAD: tl.constexpr, P: tl.constexpr, B: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Pair differences fp32 [B, P, P] of the groups of `points`, for the Gaussian kernel.

    The groups share one matrix product: what it computes between groups is thrown away.

    D_ij = (k(2i, 2j) - k(2i + 1, 2j)) - (k(2i, 2j + 1) - k(2i + 1, 2j + 1)), as in the reference:
    a sum of two numbers does not depend on their order.
    """
    S: tl.constexpr = B * 2 * P
    o_d, o_p = tl.arange(0, D_PAD), tl.arange(0, B * P)
    m = b_id >= 0
    i_slot = entry(b_id, p_virtual, p_output, base, m)
    p_k = slot_rows(i_slot, p_slots, p_table, s_page, s_slot, BLOCK_SIZE)
    m_row = m[:, None] & (o_d < D)[None, :]
    b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m_row, other=0.0)
    b_v = tl.load(p_k[:, None] + wide(s_value) + o_d[None, :], mask=m_row, other=0.0)
    b_wide = b_k.to(tl.float32)
    b_n = tl.sum(b_wide * b_wide, 1)
    b_bound = tl.max(tl.reshape(tl.max(tl.abs(b_v.to(tl.float32)), 1), [B, 2 * P]), 1)
    b_bound2 = tl.broadcast_to((b_bound * b_bound)[:, None], [B, 2 * P])
    b_bound2 = tl.reshape(b_bound2, [S])
    PRECISION: tl.constexpr = "tf32x3" if D_PAD <= 128 else "ieee"
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
def long_tile(
    op, i_tile, ids, p_virtual, p_output, base, p_mean, p_slots, p_table, s_value, s_page, s_slot,
    p_delta, p_tau, p_psi, p_sign, bound2, shift, mean2, most_root, root,
    D: tl.constexpr, D_PAD: tl.constexpr, P: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Pair differences, thresholds and psi of one tile of a group -> the largest root so far."""
    o_p = tl.arange(0, P)
    length, inputs = tl.load(op + OP.length), tl.load(op + OP.inputs)
    b_ka, b_va, b_na, b_ma, b_kb, b_vb, b_nb, b_mb = load_pairs(
        i_tile * P, length, ids + inputs, p_virtual, p_output, base, p_mean,
        p_slots, p_table, s_value, s_page, s_slot, D, D_PAD, P, BLOCK_SIZE, KIND,
    )  # fmt: skip
    b_delta = own_tile(
        b_ka, b_va, b_na, b_ma, b_kb, b_vb, b_nb, b_mb, mean2, bound2, shift, root, KIND
    )
    tl.store(p_delta + o_p[:, None] * P + o_p[None, :], b_delta)
    if KIND != 0:
        b_root = tl.sum(tl.where(o_p[:, None] == o_p[None, :], b_delta, 0.0), 1)
        b_root = tl.sqrt(tl.maximum(b_root, 0.0))
        b_root = tl.where(i_tile * P + o_p < length // 2, b_root, 0.0)
        b_most_root = tl.maximum(running_max(b_root), most_root)
        most_root = tl.maximum(most_root, tl.max(b_root, 0))
        # 2 S / delta with delta = 1/2 (reference.halving.DELTA).
        factor = 0.5 + tl.log(4.0 * length.to(tl.float32))
        tl.store(p_tau + o_p, b_root * b_most_root * factor)
    b_psi = tl.zeros([P], tl.float32)
    for i_before in range(i_tile):
        c_ka, c_va, c_na, c_ma, c_kb, c_vb, c_nb, c_mb = load_pairs(
            i_before * P, length, ids + inputs, p_virtual, p_output, base, p_mean,
            p_slots, p_table, s_value, s_page, s_slot, D, D_PAD, P, BLOCK_SIZE, KIND,
        )  # fmt: skip
        b_cross = pair_tile(
            c_ka, c_va, c_na, c_ma, c_kb, c_vb, c_nb, c_mb,
            b_ka, b_va, b_na, b_ma, b_kb, b_vb, b_nb, b_mb,
            mean2, bound2, shift, root, KIND,
        )  # fmt: skip
        b_s = tl.load(p_sign + i_before * P + o_p)
        b_psi += tl.sum(b_s[:, None] * b_cross, 0)
    tl.store(p_psi + o_p, b_psi)
    return most_root


@triton.jit
def load_pairs(
    i_pair, length, p_ids, p_virtual, p_output, base, p_mean,
    p_slots, p_table, s_value, s_page, s_slot,
    D: tl.constexpr, D_PAD: tl.constexpr, P: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """First and second points of pairs [i_pair, i_pair + P): keys, values, norms, mean products."""
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    s_value = wide(s_value)
    i_first = 2 * (i_pair + tl.arange(0, P))
    m = i_first < length
    i_a = entry(tl.load(p_ids + i_first, mask=m, other=0), p_virtual, p_output, base, m)
    i_b = entry(tl.load(p_ids + i_first + 1, mask=m, other=0), p_virtual, p_output, base, m)
    p_k = slot_rows(i_a, p_slots, p_table, s_page, s_slot, BLOCK_SIZE)
    b_ka, b_va, b_na, b_ma = load_points(p_k, p_k + s_value, m, p_mean, o_d, m_d, KIND)
    p_k = slot_rows(i_b, p_slots, p_table, s_page, s_slot, BLOCK_SIZE)
    b_kb, b_vb, b_nb, b_mb = load_points(p_k, p_k + s_value, m, p_mean, o_d, m_d, KIND)
    return b_ka, b_va, b_na, b_ma, b_kb, b_vb, b_nb, b_mb


@triton.jit
def measure(
    length, p_ids, p_virtual, p_output, base, p_mean, p_slots, p_table, s_value, s_page, s_slot,
    D: tl.constexpr, D_PAD: tl.constexpr, P: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Of one group: (largest |v|)^2 and, for centred keys, max |k - mean|^2 and |mean|^2."""
    o_d = tl.arange(0, D_PAD)
    b_mean = tl.zeros([D_PAD], tl.float32)
    bound = tl.full([], 0.0, tl.float32)
    shift = bound
    mean2 = bound
    for i_pair in range(0, tl.cdiv(length, 2), P):
        m = 2 * (i_pair + tl.arange(0, P)) < length
        b_ka, b_va, _, _, b_kb, b_vb, _, _ = load_pairs(
            i_pair, length, p_ids, p_virtual, p_output, base, p_mean, p_slots, p_table, s_value,
            s_page, s_slot, D, D_PAD, P, BLOCK_SIZE, 0,
        )  # fmt: skip
        b_mean += tl.sum(tl.where(m[:, None], b_ka.to(tl.float32) + b_kb.to(tl.float32), 0.0), 0)
        bound = tl.maximum(bound, tl.max(tl.abs(b_va.to(tl.float32))))
        bound = tl.maximum(bound, tl.max(tl.abs(b_vb.to(tl.float32))))
    if KIND != 0:
        b_mean = b_mean / length.to(tl.float32)
        mean2 = tl.sum(b_mean * b_mean, 0)
        tl.store(p_mean + o_d, b_mean, mask=o_d < D)
        tl.debug_barrier()
        for i_pair in range(0, tl.cdiv(length, 2), P):
            m = 2 * (i_pair + tl.arange(0, P)) < length
            b_ka, _, _, _, b_kb, _, _, _ = load_pairs(
                i_pair, length, p_ids, p_virtual, p_output, base, p_mean, p_slots, p_table, s_value,
            s_page, s_slot, D, D_PAD, P, BLOCK_SIZE, 0,
            )  # fmt: skip
            b_ka = tl.where(o_d[None, :] < D, b_ka.to(tl.float32) - b_mean[None, :], 0.0)
            b_kb = tl.where(o_d[None, :] < D, b_kb.to(tl.float32) - b_mean[None, :], 0.0)
            b_n = tl.maximum(tl.sum(b_ka * b_ka, 1), tl.sum(b_kb * b_kb, 1))
            shift = tl.maximum(shift, tl.max(tl.where(m, b_n, 0.0), 0))
    return bound * bound, shift, mean2


@triton.jit
def pair_tile(
    a_k, a_v, a_n, a_m, b_k, b_v, b_n, b_m, c_k, c_v, c_n, c_m, e_k, e_v, e_n, e_m,
    mean2, bound2, shift, root, KIND: tl.constexpr,
):  # fmt: skip
    """D [P, P] of pairs (a, b) in the rows and (c, e) in the columns, in the reference's order."""
    b_first = kernel_tile(
        a_k, c_k, a_v, c_v, a_n, c_n, a_m, c_m, mean2, bound2, shift, root, KIND
    ) - kernel_tile(b_k, c_k, b_v, c_v, b_n, c_n, b_m, c_m, mean2, bound2, shift, root, KIND)
    b_second = kernel_tile(
        a_k, e_k, a_v, e_v, a_n, e_n, a_m, e_m, mean2, bound2, shift, root, KIND
    ) - kernel_tile(b_k, e_k, b_v, e_v, b_n, e_n, b_m, e_m, mean2, bound2, shift, root, KIND)
    return b_first - b_second


@triton.jit
def own_tile(
    a_k, a_v, a_n, a_m, b_k, b_v, b_n, b_m, mean2, bound2, shift, root, KIND: tl.constexpr,
):  # fmt: skip
    """`pair_tile` of a tile with itself: kappa(b, a) is the transpose of kappa(a, b)."""
    b_aa = kernel_tile(a_k, a_k, a_v, a_v, a_n, a_n, a_m, a_m, mean2, bound2, shift, root, KIND)
    b_ab = kernel_tile(a_k, b_k, a_v, b_v, a_n, b_n, a_m, b_m, mean2, bound2, shift, root, KIND)
    b_bb = kernel_tile(b_k, b_k, b_v, b_v, b_n, b_n, b_m, b_m, mean2, bound2, shift, root, KIND)
    return (b_aa - tl.trans(b_ab)) - (b_ab - b_bb)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def running_max(b_x):
    """max over j <= i of x_j, [P] -> [P]."""
    return tl.associative_scan(b_x, 0, _larger)
