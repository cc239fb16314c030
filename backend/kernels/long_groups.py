"""Halving of groups longer than a tile, and those of the published kernel: measured as a whole.

A tile's psi comes from all earlier tiles (left-looking), whose products are computed again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .columns import OP
from .halving import EXPONENTIAL, entry, keep, walk
from .rows import slot_rows


class Points(NamedTuple):
    """Keys and values [P, d], squared norms of the keys [P] and, of the exponential kernel, their
    products with the mean key [P]."""

    key: Any
    value: Any
    norm: Any
    mean: Any


class Measures(NamedTuple):
    """Of a group: (largest |v|)^2 and, for keys centred by their mean, max |k - mean|^2 and
    |mean|^2."""

    bound2: Any
    shift: Any
    mean2: Any


@triton.jit
def halve_long(op, groups, ids, entries, slots, scratch, root, C: tl.constexpr):
    """Halve the only one of `groups`, tile by tile."""
    P: tl.constexpr = C.pairs
    o_g, o_p = tl.arange(0, C.halvings), tl.arange(0, P)
    length = tl.load(op + OP.length)
    p_ids = ids + tl.load(op + OP.inputs)
    measures = measure(length, p_ids, entries, slots, scratch, C)
    most_root = tl.full([], 0.0, tl.float32)
    for i_tile in range(tl.cdiv(length, 2 * P)):
        most_root = long_tile(
            i_tile, length, p_ids, entries, slots, scratch, measures, most_root, root, C
        )  # fmt: skip
        tl.debug_barrier()
        p_psi = scratch.psi + o_g[:, None] * P + o_p[None, :]
        b_psi = tl.load(p_psi, mask=groups.here[:, None], other=0.0)
        b_sign = walk(scratch, b_psi, groups.key, i_tile * P, C)
        keep(b_sign, i_tile, groups, ids, entries, scratch, C)
        tl.debug_barrier()


@triton.jit
def measure(length, p_ids, entries, slots, scratch, C: tl.constexpr):
    """`Measures` of a group; its mean key goes to scratch."""
    o_d = tl.arange(0, C.padded)
    b_mean = tl.zeros([C.padded], tl.float32)
    bound = tl.full([], 0.0, tl.float32)
    shift = bound
    mean2 = bound
    for i_pair in range(0, tl.cdiv(length, 2), C.pairs):
        m = 2 * (i_pair + tl.arange(0, C.pairs)) < length
        a, b = load_pairs(i_pair, length, p_ids, entries, slots, scratch, C, False)
        b_mean += tl.sum(tl.where(m[:, None], a.key.to(tl.float32) + b.key.to(tl.float32), 0.0), 0)
        bound = tl.maximum(bound, tl.max(tl.abs(a.value.to(tl.float32))))
        bound = tl.maximum(bound, tl.max(tl.abs(b.value.to(tl.float32))))
    if C.kind == EXPONENTIAL:
        b_mean = b_mean / length.to(tl.float32)
        mean2 = tl.sum(b_mean * b_mean, 0)
        tl.store(scratch.mean + o_d, b_mean, mask=o_d < C.size)
        tl.debug_barrier()
        shift = largest_norm(length, p_ids, entries, slots, scratch, b_mean, C)
    return Measures(bound * bound, shift, mean2)


@triton.jit
def largest_norm(length, p_ids, entries, slots, scratch, b_mean, C: tl.constexpr):
    """max |k - mean|^2 of a group."""
    m_d = (tl.arange(0, C.padded) < C.size)[None, :]
    largest = tl.full([], 0.0, tl.float32)
    for i_pair in range(0, tl.cdiv(length, 2), C.pairs):
        m = 2 * (i_pair + tl.arange(0, C.pairs)) < length
        a, b = load_pairs(i_pair, length, p_ids, entries, slots, scratch, C, False)
        b_ka = tl.where(m_d, a.key.to(tl.float32) - b_mean[None, :], 0.0)
        b_kb = tl.where(m_d, b.key.to(tl.float32) - b_mean[None, :], 0.0)
        b_n = tl.maximum(tl.sum(b_ka * b_ka, 1), tl.sum(b_kb * b_kb, 1))
        largest = tl.maximum(largest, tl.max(tl.where(m, b_n, 0.0), 0))
    return largest


@triton.jit
def long_tile(
    i_tile, length, p_ids, entries, slots, scratch, measures, most_root, root, C: tl.constexpr
):  # fmt: skip
    """Pair differences, thresholds and psi of one tile of a group -> the largest root so far."""
    P: tl.constexpr = C.pairs
    o_p = tl.arange(0, P)
    a, b = load_pairs(i_tile * P, length, p_ids, entries, slots, scratch, C, True)
    b_delta = own_tile(a, b, measures, root, C)
    tl.store(scratch.delta + o_p[:, None] * P + o_p[None, :], b_delta)
    if C.kind == EXPONENTIAL:
        b_root = tl.sum(tl.where(o_p[:, None] == o_p[None, :], b_delta, 0.0), 1)
        b_root = tl.sqrt(tl.maximum(b_root, 0.0))
        b_root = tl.where(i_tile * P + o_p < length // 2, b_root, 0.0)
        b_most_root = tl.maximum(running_max(b_root), most_root)
        most_root = tl.maximum(most_root, tl.max(b_root, 0))
        # 2 S / delta with delta = 1/2 (reference.halving.DELTA).
        factor = 0.5 + tl.log(4.0 * length.to(tl.float32))
        tl.store(scratch.tau + o_p, b_root * b_most_root * factor)
    b_psi = tl.zeros([P], tl.float32)
    for i_before in range(i_tile):
        c, e = load_pairs(i_before * P, length, p_ids, entries, slots, scratch, C, True)
        b_cross = pair_tile(c, e, a, b, measures, root, C)
        b_s = tl.load(scratch.sign + i_before * P + o_p)
        b_psi += tl.sum(b_s[:, None] * b_cross, 0)
    tl.store(scratch.psi + o_p, b_psi)
    return most_root


@triton.jit
def load_pairs(
    i_pair, length, p_ids, entries, slots, scratch, C: tl.constexpr, CENTRED: tl.constexpr
):  # fmt: skip
    """First and second `Points` of pairs [i_pair, i_pair + P)."""
    i_first = 2 * (i_pair + tl.arange(0, C.pairs))
    m = i_first < length
    i_a = entry(tl.load(p_ids + i_first, mask=m, other=0), entries, m)
    i_b = entry(tl.load(p_ids + i_first + 1, mask=m, other=0), entries, m)
    a = load_points(i_a, m, slots, scratch, C, CENTRED)
    b = load_points(i_b, m, slots, scratch, C, CENTRED)
    return a, b


@triton.jit
def load_points(i_slot, m, slots, scratch, C: tl.constexpr, CENTRED: tl.constexpr):
    """`Points` in slots [P]; with products with the mean if CENTRED, of the exponential kernel."""
    o_d = tl.arange(0, C.padded)
    m_d = o_d < C.size
    m_row = m[:, None] & m_d[None, :]
    p_k = slot_rows(i_slot, slots, C.block_size)
    b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m_row, other=0.0)
    b_v = tl.load((p_k + slots.value)[:, None] + o_d[None, :], mask=m_row, other=0.0)
    b_wide = b_k.to(tl.float32)
    b_n = tl.sum(b_wide * b_wide, 1)
    b_m = b_n
    if CENTRED and C.kind == EXPONENTIAL:
        b_mean = tl.load(scratch.mean + o_d, mask=m_d, other=0.0)
        b_m = tl.sum(b_wide * b_mean[None, :], 1)
    return Points(b_k, b_v, b_n, b_m)


@triton.jit
def pair_tile(a, b, c, e, measures, root, C: tl.constexpr):
    """D [P, P] of pairs (a, b) in the rows and (c, e) in the columns, in the reference's order."""
    b_first = kernel_tile(a, c, measures, root, C) - kernel_tile(b, c, measures, root, C)
    b_second = kernel_tile(a, e, measures, root, C) - kernel_tile(b, e, measures, root, C)
    return b_first - b_second


@triton.jit
def own_tile(a, b, measures, root, C: tl.constexpr):
    """`pair_tile` of a tile with itself: kappa(b, a) is the transpose of kappa(a, b)."""
    b_aa = kernel_tile(a, a, measures, root, C)
    b_ab = kernel_tile(a, b, measures, root, C)
    b_bb = kernel_tile(b, b, measures, root, C)
    return (b_aa - tl.trans(b_ab)) - (b_ab - b_bb)


@triton.jit
def kernel_tile(i, j, measures, root, C: tl.constexpr):
    """kappa of points i in the rows and j in the columns, fp32 [P, P].

    The exponential kernel is one of keys centred by their mean, through their products with it.
    """
    # The tensor cores' parts of wider fp32 rows do not fit in shared memory.
    PRECISION: tl.constexpr = "tf32x3" if C.padded <= 128 else "ieee"
    b_dot = tl.dot(i.key, tl.trans(j.key), input_precision=PRECISION)
    b_weight = tl.dot(i.value, tl.trans(j.value), input_precision=PRECISION) + measures.bound2
    if C.kind == EXPONENTIAL:
        b_centred = b_dot - i.mean[:, None] - j.mean[None, :] + measures.mean2
        b_kappa = tl.exp(tl.minimum((b_centred - measures.shift) * root, 0.0))
    else:
        b_distance = tl.maximum(i.norm[:, None] + j.norm[None, :] - 2.0 * b_dot, 0.0)
        b_kappa = tl.exp(-0.5 * root * b_distance)
    return b_kappa * b_weight


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def running_max(b_x):
    """max over j <= i of x_j, [P] -> [P]."""
    return tl.associative_scan(b_x, 0, _larger)
