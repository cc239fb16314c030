"""Compaction kernels: which entries survive each event of a step, as lists of source indices.

Kept points are never modified, so a request's state after an event is a list of source indices
(`rows.py`) of its stored slots; the exact recent tokens after them are consecutive.  One persistent
program per (layer, request, KV head) walks through the step's events; what does not depend on earlier
decisions (attention of the query rows to the recent tokens) is computed for all events beforehand.

Source: Express Language Modeling (arXiv 2606.10944); `reference.cache.ExpressCache` is the oracle.
"""

from __future__ import annotations

import triton
import triton.language as tl

from express_vllm.layout import DRAW, RING_ROWS
from express_vllm.rng import STREAM_COMPLEMENT, STREAM_DRAW, STREAM_SIGN

from . import plan
from .halving import kernel_tile, load_points, walk
from .rows import event_key, mix, source_rows

ROWS = tl.constexpr(RING_ROWS)
_SIGN, _COMPLEMENT = tl.constexpr(STREAM_SIGN), tl.constexpr(STREAM_COMPLEMENT)
_DRAWN, _DRAW = tl.constexpr(STREAM_DRAW), tl.constexpr(DRAW)
_HEADER, _OP = tl.constexpr(plan.HEADER), tl.constexpr(plan.OP)
_LOW = tl.constexpr(-1.0e30)

_REQUEST, _INSTANCE = tl.constexpr(plan.REQUEST), tl.constexpr(plan.INSTANCES)


@triton.jit
def score_recent_kernel(
    rows,  # [L, I, H, ROWS, D]: query rows of every event instance
    score, peak, total,  # fp32 [L, I, H, ROWS, incoming_width], [L, I, H, ROWS] twice
    instances,  # int32 [I, INSTANCES]
    requests, headers,
    pages, layer_offsets, table, key, value,
    s_page, s_head, s_slot, s_table, s_key, s_key_head, s_value, s_value_head,
    scale, heads, count, incoming_width,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HAS_OLD: tl.constexpr, HAS_NEW: tl.constexpr,
):  # fmt: skip
    """Attention scores of an event's query rows on its incoming tokens, and the running maximum and
    sum of exponentials over all its recent tokens, causal."""
    i_instance, i_head, i_layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_request = tl.load(instances + i_instance * _INSTANCE)
    request = requests + i_request * _REQUEST
    header = headers + tl.load(instances + i_instance * _INSTANCE + 1) * _HEADER
    position, stored = tl.load(header), tl.load(header + 1)
    incoming, live = tl.load(header + 2), tl.load(header + 3)
    old = tl.load(request + 2).to(tl.int32)
    recent = (tl.load(request + 3) + position - live).to(tl.int32)  # source index - slot
    token, i_table = tl.load(request + 4), tl.load(request + 7)
    p_slots = pages + tl.load(layer_offsets + i_layer) + i_head * s_head
    if BLOCK_SIZE == 0:
        p_slots += i_request.to(tl.int64) * s_page
    p_slots = tl.multiple_of(p_slots, 16)
    p_key = key + token * s_key + i_head * s_key_head
    p_value = value + token * s_value + i_head * s_value_head

    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    m_d = o_d < D
    i_row = ((i_layer * count + i_instance).to(tl.int64) * heads + i_head) * ROWS
    b_q = tl.load(rows + (i_row + o_r[:, None]) * D + o_d[None, :], mask=m_d[None, :], other=0.0)
    b_peak = tl.full([ROWS, BLOCK], _LOW, tl.float32)
    b_total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(stored, live, BLOCK):
        i_slot = first + tl.arange(0, BLOCK)
        m_slot = i_slot < live
        p_k, _ = source_rows(
            tl.where(m_slot, i_slot, stored) + recent, old, p_slots, table + i_table * s_table,
            s_page, s_slot, p_key, p_value, s_key, s_value, D, BLOCK_SIZE, HAS_OLD, HAS_NEW,
        )  # fmt: skip
        b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m_d[None, :], other=0.0)
        b_score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        m_seen = i_slot[None, :] <= live - ROWS + o_r[:, None]
        b_score = tl.where(m_seen, b_score, _LOW)
        m_in = (i_slot < stored + incoming)[None, :]
        p_score = score + (i_row + o_r[:, None]) * incoming_width + (i_slot - stored)[None, :]
        tl.store(p_score, b_score, mask=m_in)
        b_new = tl.maximum(b_peak, b_score)
        b_total = b_total * tl.exp(b_peak - b_new) + tl.where(m_seen, tl.exp(b_score - b_new), 0.0)
        b_peak = b_new
    b_most = tl.max(b_peak, 1)
    tl.store(peak + i_row + o_r, b_most)
    tl.store(total + i_row + o_r, tl.sum(b_total * tl.exp(b_peak - b_most[:, None]), 1))


@triton.jit
def largest(b_bits, heavy, C: tl.constexpr):
    """The `heavy`-th largest of int32 [C] (non-negative; -1 marks absent), found four bits at a time."""
    o_digit = tl.arange(0, 16)
    threshold = tl.full([], 0, tl.int32)
    for i in tl.static_range(8):
        shift = 28 - 4 * i
        b_try = threshold + (o_digit << shift)
        # Digits above 7 of the first step would set the sign bit.
        m_try = b_try >= 0
        b_count = tl.sum((b_bits[:, None] >= b_try[None, :]).to(tl.int32), 0)
        digit = tl.sum(((b_count >= heavy) & m_try).to(tl.int32), 0) - 1
        threshold += digit << shift
    return threshold


@triton.jit
def compact_kernel(
    requests, headers, rounds, ops, ids, bias,
    rows, score, peak, total,
    pages, layer_offsets, table, key, value,
    lists,  # int32 out [L, list rows, H, width]: rows LIST (before) and LIST + 1 + e of a request
    scratch, virtual,  # fp32 [programs, scratch_width], int32 [programs, virtual_width]
    s_page, s_head, s_slot, s_table, s_key, s_key_head, s_value, s_value_head,
    scale, root,  # softmax scale; 1 / sqrt(D) of the halving kernel
    tasks, request_count, heads, first_head, first_layer, layer_ids, sinks, heavy,
    instance_count, list_rows, width, incoming_width, scratch_width, virtual_width, skip, limit,
    D: tl.constexpr, D_PAD: tl.constexpr, C: tl.constexpr, C_ROWS: tl.constexpr,
    BLOCK: tl.constexpr, G: tl.constexpr, P: tl.constexpr, TILES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HAS_OLD: tl.constexpr, HAS_NEW: tl.constexpr,
    HAS_HEAVY: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Work off events [skip, min(skip + limit, EVENTS)) of every request, layer and KV head.

    Within a program entries pass from phase to phase through scratch that only this program uses;
    a barrier between a phase that writes and one that reads orders them.
    """
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    o_r, o_p, o_g = tl.arange(0, ROWS), tl.arange(0, P), tl.arange(0, G)
    p_virtual = virtual + tl.program_id(0).to(tl.int64) * virtual_width
    # Scratch: scores of the old heavy hitters, maxima, sums, differences, thresholds, psi, signs,
    # mean key.
    p_heavy = scratch + tl.program_id(0).to(tl.int64) * scratch_width
    p_most = p_heavy + ROWS * heavy
    p_sum = p_most + ROWS
    p_delta = p_sum + ROWS
    p_tau = p_delta + G * P * P
    p_psi = p_tau + G * P
    p_sign = p_psi + G * P
    p_mean = p_sign + G * P * TILES
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        i_head = task % heads
        i_request = (task // heads) % request_count
        request = requests + i_request * _REQUEST
        i_layer = task // (heads * request_count)
        event_first = tl.load(request).to(tl.int32)
        events = tl.load(request + 1).to(tl.int32)
        old = tl.load(request + 2).to(tl.int32)
        move = tl.load(request + 3)
        token = tl.load(request + 4)
        seed_low, seed_high = tl.load(request + 5).to(tl.uint32), tl.load(request + 6).to(tl.uint32)
        i_table = tl.load(request + 7)
        list_first, instance_first = tl.load(request + 8), tl.load(request + 9)
        p_slots = pages + tl.load(layer_offsets + i_layer) + i_head * s_head
        if BLOCK_SIZE == 0:
            p_slots += tl.cast(i_request, tl.int64) * s_page
        p_slots = tl.multiple_of(p_slots, 16)
        p_table = table + i_table * s_table
        p_key = key + token * s_key + i_head * s_key_head
        p_value = value + token * s_value + i_head * s_value_head
        layer = (first_layer + tl.load(layer_ids + i_layer)).to(tl.uint32)
        p_list = lists + ((i_layer * list_rows + list_first) * heads + i_head) * width
        if skip == 0:  # the state before the first event: the stored slots as they are
            known = tl.load(headers + event_first * _HEADER + 1)
            for j in range(0, known, WIDE):
                o_j = j + tl.arange(0, WIDE)
                tl.store(p_list + o_j, o_j, mask=o_j < known)
            tl.debug_barrier()
        for e in range(skip, tl.minimum(events, skip + limit)):
            header = headers + (event_first + e) * _HEADER
            position, stored = tl.load(header), tl.load(header + 1)
            incoming, live = tl.load(header + 2), tl.load(header + 3)
            after, round_first = tl.load(header + 4), tl.load(header + 5)
            round_count, final = tl.load(header + 6), tl.load(header + 7)
            recent = (move + position - live).to(tl.int32)
            p_old = p_list + e * heads * width
            # Entries that stay where they are, the incoming ones behind them.
            for j in range(0, stored + incoming, WIDE):
                o_j = j + tl.arange(0, WIDE)
                b_source = tl.load(p_old + o_j, mask=o_j < stored, other=0)
                b_source = tl.where(o_j < stored, b_source, o_j + recent)
                m_j = o_j < stored + incoming
                if HAS_HEAVY:
                    m_j = m_j & ((o_j < sinks) | ((o_j >= sinks + heavy) & (o_j < stored)))
                tl.store(p_virtual + o_j, b_source, mask=m_j)
            if HAS_HEAVY:
                i_row = (i_layer * instance_count + instance_first + e) * heads + i_head
                i_row = i_row * ROWS
                b_q = tl.load(
                    rows + (i_row + o_r[:, None]) * D + o_d[None, :], mask=m_d[None, :], other=0.0
                )
                p_bias = bias + tl.load(header + 8)
                b_peak = tl.full([ROWS, BLOCK], _LOW, tl.float32)
                b_total = tl.zeros([ROWS, BLOCK], tl.float32)
                for first in range(0, stored, BLOCK):
                    i_slot = first + tl.arange(0, BLOCK)
                    m_slot = i_slot < stored
                    i_source = tl.load(p_old + i_slot, mask=m_slot, other=0)
                    b_bias = tl.load(p_bias + i_slot, mask=m_slot, other=0.0)
                    p_k, _ = source_rows(
                        i_source, old, p_slots, p_table, s_page, s_slot, p_key, p_value,
                        s_key, s_value, D, BLOCK_SIZE, HAS_OLD, HAS_NEW,
                    )  # fmt: skip
                    b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m_d[None, :], other=0.0)
                    b_score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
                    b_score += b_bias[None, :] * 0.6931471805599453
                    b_score = tl.where(m_slot[None, :], b_score, _LOW)
                    i_heavy = i_slot - sinks
                    m_heavy = (i_heavy >= 0) & (i_heavy < heavy)
                    tl.store(
                        p_heavy + o_r[:, None] * heavy + i_heavy[None, :], b_score,
                        mask=m_heavy[None, :],
                    )  # fmt: skip
                    b_new = tl.maximum(b_peak, b_score)
                    b_grown = tl.where(m_slot[None, :], tl.exp(b_score - b_new), 0.0)
                    b_total = b_total * tl.exp(b_peak - b_new) + b_grown
                    b_peak = b_new
                b_near, b_near_sum = tl.load(peak + i_row + o_r), tl.load(total + i_row + o_r)
                b_most = tl.maximum(tl.max(b_peak, 1), b_near)
                b_sum = tl.sum(b_total * tl.exp(b_peak - b_most[:, None]), 1)
                b_sum += b_near_sum * tl.exp(b_near - b_most)
                tl.store(p_most + o_r, b_most)
                tl.store(p_sum + o_r, 1.0 / b_sum)
                tl.debug_barrier()
                # Attention mass of the candidates: the old heavy hitters, then the incoming.
                o_c = tl.arange(0, C)
                m_c = o_c < heavy + incoming
                b_mass = tl.zeros([C], tl.float32)
                for r in range(0, ROWS, C_ROWS):
                    o_cr = r + tl.arange(0, C_ROWS)
                    m_old = (o_c < heavy)[None, :]
                    p_near = score + (i_row + o_cr[:, None]) * incoming_width
                    p_score = tl.where(
                        m_old, p_heavy + o_cr[:, None] * heavy + o_c[None, :],
                        p_near + (o_c - heavy)[None, :],
                    )  # fmt: skip
                    b_score = tl.load(p_score, mask=m_c[None, :], other=_LOW)
                    b_most_r, b_sum_r = tl.load(p_most + o_cr), tl.load(p_sum + o_cr)
                    b_share = tl.exp(b_score - b_most_r[:, None]) * b_sum_r[:, None]
                    b_mass += tl.sum(b_share, 0)
                # Non-negative floats sort as their bits do.
                b_bits = tl.where(m_c, b_mass.to(tl.int32, bitcast=True), -1)
                threshold = largest(b_bits, heavy, C)
                above = tl.sum((b_bits > threshold).to(tl.int32), 0)
                b_tied = (b_bits == threshold).to(tl.int32)
                b_tie_rank = tl.cumsum(b_tied, 0)
                b_kept = (b_bits > threshold) | ((b_tied != 0) & (b_tie_rank <= heavy - above))
                b_rank = tl.cumsum(b_kept.to(tl.int32), 0)  # kept up to and with this candidate
                b_target = tl.where(b_kept, sinks + b_rank - 1, stored + o_c - b_rank)
                b_source = tl.load(p_old + sinks + o_c, mask=o_c < heavy, other=0)
                b_source = tl.where(o_c < heavy, b_source, stored + o_c - heavy + recent)
                tl.store(p_virtual + b_target, b_source, mask=m_c)
            tl.debug_barrier()

            event = event_key(
                seed_low, seed_high, layer, (first_head + i_head).to(tl.uint32),
                position.to(tl.uint32),
            )  # fmt: skip
            for i_round in range(round_first, round_first + round_count):
                op_first, op_count = (
                    tl.load(rounds + 2 * i_round),
                    tl.load(rounds + 2 * i_round + 1),
                )
                op = ops + op_first * _OP
                if tl.load(op) == _DRAW:
                    length, seen = tl.load(op + 1), tl.load(op + 2)
                    draw = mix(mix(mix(event, tl.load(op + 3).to(tl.uint32)), _DRAWN), 0)
                    entries = length + seen - tl.where(seen > 0, 1, 0)
                    # floor(u * entries) in integers: fp32 would round the product.
                    ticket = (((draw >> 8).to(tl.int64) * entries) >> 24).to(tl.int32)
                    ticket = tl.where(seen > 0, tl.maximum(ticket - seen + 1, 0), ticket)
                    b_id = tl.load(ids + tl.load(op + 4) + ticket)
                    tl.store(p_virtual + tl.load(op + 5), tl.load(p_virtual + b_id))
                else:
                    m_g = o_g < op_count
                    p_op = op + o_g * _OP
                    b_length = tl.load(p_op + 1, mask=m_g, other=0)
                    b_index = tl.load(p_op + 3, mask=m_g, other=0).to(tl.uint32)
                    b_inputs = tl.load(p_op + 4, mask=m_g, other=0)
                    b_output = tl.load(p_op + 5, mask=m_g, other=0)
                    b_op = mix(tl.zeros([G], tl.uint32) + event, b_index)
                    b_key = mix(b_op, tl.full([G], _SIGN, tl.uint32))
                    b_flip = mix(b_op, tl.full([G], _COMPLEMENT, tl.uint32))
                    b_flip = (mix(b_flip, tl.zeros([G], tl.uint32)) & 1).to(tl.int32)
                    bound2, shift, mean2, most_root = 0.0, 0.0, 0.0, 0.0
                    if TILES > 1 or KIND != 0:
                        bound2, shift, mean2 = measure(
                            tl.load(op + 1), ids + tl.load(op + 4), p_virtual, p_mean, old, p_slots,
                            p_table, s_page, s_slot, p_key, p_value, s_key, s_value,
                            D, D_PAD, P, BLOCK_SIZE, HAS_OLD, HAS_NEW, KIND,
                        )  # fmt: skip
                    longest = tl.max(b_length, 0)
                    for i_tile in range(0, tl.cdiv(longest, 2 * P)):
                        for g in range(0, op_count):
                            length, inputs = tl.load(op + g * _OP + 1), tl.load(op + g * _OP + 4)
                            b_ka, b_va, b_na, b_ma, b_kb, b_vb, b_nb, b_mb = load_pairs(
                                i_tile * P, length, ids + inputs, p_virtual, p_mean, old, p_slots,
                                p_table, s_page, s_slot, p_key, p_value, s_key, s_value,
                                D, D_PAD, P, BLOCK_SIZE, HAS_OLD, HAS_NEW, KIND,
                            )  # fmt: skip
                            if TILES == 1 and KIND == 0:
                                bound2 = tl.maximum(
                                    tl.max(tl.abs(b_va.to(tl.float32))),
                                    tl.max(tl.abs(b_vb.to(tl.float32))),
                                )
                                bound2 = bound2 * bound2
                            b_delta = pair_tile(
                                b_ka, b_va, b_na, b_ma, b_kb, b_vb, b_nb, b_mb,
                                b_ka, b_va, b_na, b_ma, b_kb, b_vb, b_nb, b_mb,
                                mean2, bound2, shift, root, KIND,
                            )  # fmt: skip
                            p_tile = p_delta + g * (P * P)
                            tl.store(p_tile + o_p[:, None] * P + o_p[None, :], b_delta)
                            if KIND != 0:
                                b_root = tl.sum(
                                    tl.where(o_p[:, None] == o_p[None, :], b_delta, 0.0), 1
                                )
                                b_root = tl.sqrt(tl.maximum(b_root, 0.0))
                                m_pair = i_tile * P + o_p < length // 2
                                b_root = tl.where(m_pair, b_root, 0.0)
                                b_most_root = tl.maximum(running_max(b_root), most_root)
                                most_root = tl.maximum(most_root, tl.max(b_root, 0))
                                # 2 S / delta with delta = 1/2 (reference.halving.DELTA).
                                factor = 0.5 + tl.log(4.0 * length.to(tl.float32))
                                tl.store(p_tau + g * P + o_p, b_root * b_most_root * factor)
                            if TILES > 1:
                                b_psi = tl.zeros([P], tl.float32)
                                for i_before in range(0, i_tile):
                                    c_ka, c_va, c_na, c_ma, c_kb, c_vb, c_nb, c_mb = load_pairs(
                                        i_before * P, length, ids + inputs, p_virtual, p_mean, old,
                                        p_slots, p_table, s_page, s_slot, p_key, p_value, s_key,
                                        s_value, D, D_PAD, P, BLOCK_SIZE, HAS_OLD, HAS_NEW, KIND,
                                    )  # fmt: skip
                                    b_delta = pair_tile(
                                        c_ka, c_va, c_na, c_ma, c_kb, c_vb, c_nb, c_mb,
                                        b_ka, b_va, b_na, b_ma, b_kb, b_vb, b_nb, b_mb,
                                        mean2, bound2, shift, root, KIND,
                                    )  # fmt: skip
                                    b_s = tl.load(p_sign + (g * TILES + i_before) * P + o_p)
                                    b_psi += tl.sum(b_s[:, None] * b_delta, 0)
                                tl.store(p_psi + g * P + o_p, b_psi)
                        tl.debug_barrier()
                        b_psi_all = tl.zeros([G, P], tl.float32)
                        o_gp = o_g[:, None] * P + o_p[None, :]
                        if TILES > 1:
                            b_psi_all = tl.load(p_psi + o_gp, mask=m_g[:, None], other=0.0)
                        b_sign = walk(p_delta, p_tau, b_psi_all, b_key, m_g, i_tile * P, G, P, KIND)
                        if TILES > 1:
                            o_sign = (o_g[:, None] * TILES + i_tile) * P + o_p[None, :]
                            tl.store(
                                p_sign + o_sign, 2.0 * b_sign.to(tl.float32) - 1.0,
                                mask=m_g[:, None],
                            )  # fmt: skip
                        # Of pair i the point 2 i + kept stays, as output i.
                        i_pair = i_tile * P + o_p
                        b_kept = (b_sign ^ 1) ^ b_flip[:, None]
                        m_out = m_g[:, None] & (i_pair[None, :] < b_length[:, None] // 2)
                        b_id = tl.load(
                            ids + b_inputs[:, None] + 2 * i_pair[None, :] + b_kept,
                            mask=m_out, other=0,
                        )  # fmt: skip
                        b_source = tl.load(p_virtual + b_id, mask=m_out, other=0)
                        tl.store(
                            p_virtual + b_output[:, None] + i_pair[None, :], b_source, mask=m_out
                        )
                        tl.debug_barrier()
                tl.debug_barrier()
            p_new = p_old + heads * width
            for j in range(0, after, WIDE):
                o_j = j + tl.arange(0, WIDE)
                b_id = tl.load(ids + final + o_j, mask=o_j < after, other=0)
                b_source = tl.load(p_virtual + b_id, mask=o_j < after, other=0)
                tl.store(p_new + o_j, b_source, mask=o_j < after)
            tl.debug_barrier()


@triton.jit
def load_pairs(
    i_pair, length, p_ids, p_virtual, p_mean, old, p_slots, p_table, s_page, s_slot, p_key,
    p_value, s_key, s_value,
    D: tl.constexpr, D_PAD: tl.constexpr, P: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HAS_OLD: tl.constexpr, HAS_NEW: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """First and second points of pairs [i_pair, i_pair + P): keys, values, norms, mean products."""
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    i_first = 2 * (i_pair + tl.arange(0, P))
    m = i_first < length
    i_a = tl.load(p_virtual + tl.load(p_ids + i_first, mask=m, other=0))
    i_b = tl.load(p_virtual + tl.load(p_ids + i_first + 1, mask=m, other=0))
    p_k, p_v = source_rows(
        i_a, old, p_slots, p_table, s_page, s_slot, p_key, p_value, s_key, s_value, D,
        BLOCK_SIZE, HAS_OLD, HAS_NEW,
    )  # fmt: skip
    b_ka, b_va, b_na, b_ma = load_points(p_k, p_v, m, p_mean, o_d, m_d, KIND)
    p_k, p_v = source_rows(
        i_b, old, p_slots, p_table, s_page, s_slot, p_key, p_value, s_key, s_value, D,
        BLOCK_SIZE, HAS_OLD, HAS_NEW,
    )  # fmt: skip
    b_kb, b_vb, b_nb, b_mb = load_points(p_k, p_v, m, p_mean, o_d, m_d, KIND)
    return b_ka, b_va, b_na, b_ma, b_kb, b_vb, b_nb, b_mb


@triton.jit
def measure(
    length, p_ids, p_virtual, p_mean, old, p_slots, p_table, s_page, s_slot, p_key, p_value,
    s_key, s_value,
    D: tl.constexpr, D_PAD: tl.constexpr, P: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HAS_OLD: tl.constexpr, HAS_NEW: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Of one group: (largest |v|)^2 and, for centred keys, max |k - mean|^2 and |mean|^2."""
    o_d = tl.arange(0, D_PAD)
    b_mean = tl.zeros([D_PAD], tl.float32)
    bound, shift, mean2 = 0.0, 0.0, 0.0
    for i_pair in range(0, tl.cdiv(length, 2), P):
        m = 2 * (i_pair + tl.arange(0, P)) < length
        b_ka, b_va, _, _, b_kb, b_vb, _, _ = load_pairs(
            i_pair, length, p_ids, p_virtual, p_mean, old, p_slots, p_table, s_page, s_slot, p_key,
            p_value, s_key, s_value, D, D_PAD, P, BLOCK_SIZE, HAS_OLD, HAS_NEW, 0,
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
                i_pair, length, p_ids, p_virtual, p_mean, old, p_slots, p_table, s_page, s_slot,
                p_key, p_value, s_key, s_value, D, D_PAD, P, BLOCK_SIZE, HAS_OLD, HAS_NEW, 0,
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
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def running_max(b_x):
    """max over j <= i of x_j, [P] -> [P]."""
    return tl.associative_scan(b_x, 0, _larger)
