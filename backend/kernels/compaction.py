"""Compaction kernels: which entries survive each event of a step, as lists of source indices.

Kept points are never modified, so a request's state after an event is a list of source indices
(`rows.py`) of its stored slots; the exact recent tokens after them are consecutive.  A persistent
team of programs per (layer, request, KV head) walks through the step's events; what does not depend
on earlier decisions (attention of the query rows to the recent tokens) is computed for all events
beforehand.

Source: Express Language Modeling (arXiv 2606.10944); `reference.cache.ExpressCache` is the oracle.
"""

from __future__ import annotations

import triton
import triton.language as tl

from express_vllm.layout import DRAW, RING_ROWS
from express_vllm.rng import STREAM_COMPLEMENT, STREAM_DRAW, STREAM_SIGN

from . import columns
from .halving import kernel_tile, load_points, walk_half
from .rows import event_key, mix, slot_rows

ROWS = tl.constexpr(RING_ROWS)
_SIGN, _COMPLEMENT = tl.constexpr(STREAM_SIGN), tl.constexpr(STREAM_COMPLEMENT)
_DRAWN, _DRAW = tl.constexpr(STREAM_DRAW), tl.constexpr(DRAW)
_LOW = tl.constexpr(-1.0e30)


@triton.jit
def score_recent_kernel(
    rows,  # [L, I, H, ROWS, D]: query rows of every event instance
    score, peak, total,  # fp32 [L, I, H, ROWS, score_width], [L, I, H, ROWS] twice
    instances,  # int32 [I, INSTANCES]
    requests, headers,
    pages, layer_offsets, table,
    s_page, s_head, s_slot, s_table,
    scale, heads, count, heavy, score_width,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Attention scores of an event's query rows on its incoming tokens, and the running maximum and
    sum of exponentials over all its recent tokens, causal."""
    i_instance, i_head, i_layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_request = tl.load(instances + i_instance * columns.INSTANCES)
    request = requests + i_request * columns.REQUEST
    header = headers + tl.load(instances + i_instance * columns.INSTANCES + 1) * columns.HEADER
    position, stored = tl.load(header + columns.POSITION), tl.load(header + columns.STORED)
    incoming, live = tl.load(header + columns.INCOMING), tl.load(header + columns.LIVE)
    recent = (tl.load(request + columns.SHIFT) + position - live).to(
        tl.int32
    )  # source index - slot
    i_table = tl.load(request + columns.TABLE)
    p_slots = pages + tl.multiple_of(tl.load(layer_offsets + i_layer), 16) + i_head * s_head
    if BLOCK_SIZE == 0:
        p_slots += i_request.to(tl.int64) * s_page

    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    m_d = o_d < D
    i_row = ((i_layer * count + i_instance).to(tl.int64) * heads + i_head) * ROWS
    b_q = tl.load(rows + (i_row + o_r[:, None]) * D + o_d[None, :], mask=m_d[None, :], other=0.0)
    b_peak = tl.full([ROWS, BLOCK], _LOW, tl.float32)
    b_total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(stored, live, BLOCK):
        i_slot = first + tl.arange(0, BLOCK)
        m_slot = i_slot < live
        p_k = slot_rows(
            tl.where(m_slot, i_slot, stored) + recent, p_slots, table + i_table * s_table,
            s_page, s_slot, BLOCK_SIZE,
        )  # fmt: skip
        b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m_d[None, :], other=0.0)
        b_score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        m_seen = i_slot[None, :] <= live - ROWS + o_r[:, None]
        b_score = tl.where(m_seen, b_score, _LOW)
        m_in = (i_slot < stored + incoming)[None, :]
        i_column = heavy + i_slot - stored  # of the candidates: old heavy hitters, then incoming
        p_score = score + (i_row + o_r[:, None]) * score_width + i_column[None, :]
        tl.store(p_score, b_score, mask=m_in)
        b_new = tl.maximum(b_peak, b_score)
        b_total = b_total * tl.exp(b_peak - b_new) + tl.where(m_seen, tl.exp(b_score - b_new), 0.0)
        b_peak = b_new
    b_most = tl.max(b_peak, 1)
    tl.store(peak + i_row + o_r, b_most)
    tl.store(total + i_row + o_r, tl.sum(b_total * tl.exp(b_peak - b_most[:, None]), 1))


@triton.jit
def largest(b_bits, heavy):
    """A threshold t with as many of int32 [C] at or above it as `heavy` asks, and that count.

    Entries are non-negative, -1 marks absent ones.  Two bits of t are found at a time, from one sum
    of three counts.  It ends as soon as the count is met; if ties prevent that, t is the
    `heavy`-th largest entry and the count is larger.
    """
    threshold = tl.full([], 0, tl.int32)
    count = tl.sum((b_bits >= 0).to(tl.int32), 0)
    shift = tl.full([], 29, tl.int32)
    while (count != heavy) & (shift >= -1):
        unit = tl.full([], 1, tl.int32) << tl.maximum(shift, 0)
        b_one = (b_bits >= threshold + unit).to(tl.int64)
        b_two = (b_bits >= threshold + 2 * unit).to(tl.int64)
        b_three = (b_bits >= threshold + 3 * unit).to(tl.int64)
        counts = tl.sum(b_one + (b_two << 16) + (b_three << 32), 0)
        one, two = (counts & 0xFFFF).to(tl.int32), ((counts >> 16) & 0xFFFF).to(tl.int32)
        three = (counts >> 32).to(tl.int32)
        if three >= heavy:
            threshold += 3 * unit
            count = three
        elif two >= heavy:
            threshold += 2 * unit
            count = two
        elif one >= heavy:
            threshold += unit
            count = one
        shift -= 2
    return threshold, count


@triton.jit
def compact_kernel(
    requests, headers, rounds, ops, ids, bias,
    rows, score, peak, total,
    pages, layer_offsets, table,
    lists,  # int32 out [L, list rows, H, width]: rows LIST (before) and LIST + 1 + e of a request
    scratch, virtual,  # fp32 [programs, scratch_width], int32 [programs, virtual_width]
    shared, arrived,  # fp32 [teams, shared_width], int32 [teams] zeros: what a team's members share
    s_page, s_head, s_slot, s_table,
    scale, root,  # softmax scale; 1 / sqrt(D) of the halving kernel
    tasks, request_count, heads, first_head, first_layer, layer_ids, sinks, heavy,
    instance_count, list_rows, width, score_width, scratch_width, virtual_width,
    shared_width, skip, limit,
    D: tl.constexpr, D_PAD: tl.constexpr, C: tl.constexpr, TEAM: tl.constexpr,
    SCORE_TILES: tl.constexpr,  # a power of two from the shape alone: it orders a sum
    BLOCK: tl.constexpr, G: tl.constexpr, P: tl.constexpr, TILES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HAS_HEAVY: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Work off events [skip, min(skip + limit, EVENTS)) of every request, layer and KV head.

    A team of TEAM programs takes one of them: its members share out the tiles of scores and the
    halvings of a round, meet, and repeat the rest each for itself.  Within a program entries pass
    from phase to phase through scratch of its own; a barrier orders writers before readers.  No
    arithmetic depends on TEAM: partial sums belong to tiles, not to programs.
    """
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    o_r, o_p, o_g = tl.arange(0, ROWS), tl.arange(0, P), tl.arange(0, G)
    HALF: tl.constexpr = P // 2
    o_half = tl.arange(0, HALF)
    team, member = tl.program_id(0) // TEAM, tl.program_id(0) % TEAM
    p_virtual = virtual + tl.program_id(0).to(tl.int64) * virtual_width
    # Own scratch: maxima, sums, differences, thresholds, psi, signs, mean key.
    p_most = scratch + tl.program_id(0).to(tl.int64) * scratch_width
    p_sum = p_most + ROWS
    p_delta = p_sum + ROWS
    p_tau = p_delta + G * P * P
    p_psi = p_tau + G * P
    p_sign = p_psi + G * P
    p_mean = p_sign + G * P * TILES
    # Shared, twice since a member may still read an event's part while another writes the next's:
    # maxima and sums of every tile of scores.  Then the halvings' outputs.
    p_shared = shared + team.to(tl.int64) * shared_width
    part = 2 * ROWS * SCORE_TILES
    p_output = (p_shared + 2 * part).to(tl.pointer_type(tl.int32))
    p_arrived = arrived + team
    meetings = 0
    for task in range(team, tasks, tl.num_programs(0) // TEAM):
        i_head = task % heads
        i_request = (task // heads) % request_count
        request = requests + i_request * columns.REQUEST
        i_layer = task // (heads * request_count)
        event_first = tl.load(request + columns.EVENT).to(tl.int32)
        events = tl.load(request + columns.EVENTS).to(tl.int32)
        move = tl.load(request + columns.SHIFT)
        seed_low, seed_high = (
            tl.load(request + columns.SEED_LOW).to(tl.uint32),
            tl.load(request + columns.SEED_HIGH).to(tl.uint32),
        )
        i_table = tl.load(request + columns.TABLE)
        list_first, instance_first = (
            tl.load(request + columns.LIST),
            tl.load(request + columns.INSTANCE),
        )
        p_slots = pages + tl.multiple_of(tl.load(layer_offsets + i_layer), 16) + i_head * s_head
        if BLOCK_SIZE == 0:
            p_slots += tl.cast(i_request, tl.int64) * s_page
        p_table = table + i_table * s_table
        layer = (first_layer + tl.load(layer_ids + i_layer)).to(tl.uint32)
        p_list = lists + ((i_layer * list_rows + list_first) * heads + i_head) * width
        if skip == 0:  # the state before the first event: the stored slots as they are
            known = tl.load(headers + event_first * columns.HEADER + columns.STORED)
            for j in range(0, known, WIDE):
                o_j = j + tl.arange(0, WIDE)
                tl.store(p_list + o_j, o_j, mask=o_j < known)
            tl.debug_barrier()
        for e in range(skip, tl.minimum(events, skip + limit)):
            header = headers + (event_first + e) * columns.HEADER
            position, stored = tl.load(header + columns.POSITION), tl.load(header + columns.STORED)
            incoming, live = tl.load(header + columns.INCOMING), tl.load(header + columns.LIVE)
            after, round_first = tl.load(header + columns.AFTER), tl.load(header + columns.ROUND)
            round_count, final = tl.load(header + columns.ROUNDS), tl.load(header + columns.FINAL)
            recent = (move + position - live).to(tl.int32)
            p_old = p_list + e * heads * width
            base = stored + incoming  # virtual ids from here on are outputs
            # Entries that stay where they are, the incoming ones behind them.
            for j in range(0, stored + incoming, WIDE):
                o_j = j + tl.arange(0, WIDE)
                b_same = tl.load(p_old + o_j, mask=o_j < stored, other=0)
                b_same = tl.where(o_j < stored, b_same, o_j + recent)
                m_j = o_j < stored + incoming
                if HAS_HEAVY:
                    m_j = m_j & ((o_j < sinks) | ((o_j >= sinks + heavy) & (o_j < stored)))
                tl.store(p_virtual + o_j, b_same, mask=m_j)
            if HAS_HEAVY:
                i_row = (i_layer * instance_count + instance_first + e) * heads + i_head
                i_row = i_row * ROWS
                b_q = tl.load(
                    rows + (i_row + o_r[:, None]) * D + o_d[None, :], mask=m_d[None, :], other=0.0
                )
                p_bias = bias + tl.load(header + columns.BIAS)
                p_tile = p_shared + (e % 2) * part
                p_score = score + i_row * score_width
                for first in range(member * BLOCK, stored, TEAM * BLOCK):
                    i_slot = first + tl.arange(0, BLOCK)
                    m_slot = i_slot < stored
                    i_source = tl.load(p_old + i_slot, mask=m_slot, other=0)
                    b_bias = tl.load(p_bias + i_slot, mask=m_slot, other=0.0)
                    p_k = slot_rows(i_source, p_slots, p_table, s_page, s_slot, BLOCK_SIZE)
                    b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m_d[None, :], other=0.0)
                    b_score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
                    b_score += b_bias[None, :] * 0.6931471805599453
                    b_score = tl.where(m_slot[None, :], b_score, _LOW)
                    if first < sinks + heavy:
                        i_heavy = i_slot - sinks
                        m_heavy = (i_heavy >= 0) & (i_heavy < heavy)
                        tl.store(
                            p_score + o_r[:, None] * score_width + i_heavy[None, :], b_score,
                            mask=m_heavy[None, :],
                        )  # fmt: skip
                    b_peak = tl.max(b_score, 1)
                    b_grown = tl.where(m_slot[None, :], tl.exp(b_score - b_peak[:, None]), 0.0)
                    p_here = p_tile + first // BLOCK * (2 * ROWS)
                    tl.store(p_here + o_r, b_peak)
                    tl.store(p_here + ROWS + o_r, tl.sum(b_grown, 1))
                meetings += TEAM
                meet(p_arrived, meetings, TEAM)
                b_near, b_near_sum = tl.load(peak + i_row + o_r), tl.load(total + i_row + o_r)
                o_t = tl.arange(0, SCORE_TILES)
                m_t = (o_t < tl.cdiv(stored, BLOCK))[None, :]
                p_part = p_tile + o_t[None, :] * (2 * ROWS) + o_r[:, None]
                b_tops = tl.load(p_part, mask=m_t, other=_LOW)
                b_sums = tl.load(p_part + ROWS, mask=m_t, other=0.0)
                b_most = tl.maximum(tl.max(b_tops, 1), b_near)
                b_sum = tl.sum(b_sums * tl.exp(b_tops - b_most[:, None]), 1)
                b_sum += b_near_sum * tl.exp(b_near - b_most)
                tl.store(p_most + o_r, b_most)
                tl.store(p_sum + o_r, 1.0 / b_sum)
                tl.debug_barrier()
                # Attention mass of the candidates: the old heavy hitters, then the incoming.  Row
                # by row, so that the sum does not depend on how many candidates there are.
                o_c = tl.arange(0, C)
                m_c = o_c < heavy + incoming
                b_mass = tl.zeros([C], tl.float32)
                for r in range(0, ROWS, 16):
                    for u in tl.static_range(16):
                        p_mine = p_score + (r + u) * score_width + o_c
                        b_mine = tl.load(p_mine, mask=m_c, other=_LOW)
                        b_share = tl.exp(b_mine - tl.load(p_most + r + u))
                        b_mass += b_share * tl.load(p_sum + r + u)
                # Non-negative floats sort as their bits do.
                b_bits = tl.where(m_c, b_mass.to(tl.int32, bitcast=True), -1)
                threshold, count = largest(b_bits, heavy)
                b_keep = (b_bits >= threshold).to(tl.int32)
                if count != heavy:  # ties at the threshold: the lower candidates stay
                    b_tied = (b_bits == threshold).to(tl.int32)
                    above = count - tl.sum(b_tied, 0)
                    b_keep = tl.where(
                        (b_tied != 0) & (tl.cumsum(b_tied, 0) > heavy - above), 0, b_keep
                    )
                b_kept = b_keep != 0
                b_rank = tl.cumsum(b_keep, 0)  # kept up to and with this candidate
                b_target = tl.where(b_kept, sinks + b_rank - 1, stored + o_c - b_rank)
                b_candidate = tl.load(p_old + sinks + o_c, mask=o_c < heavy, other=0)
                b_candidate = tl.where(o_c < heavy, b_candidate, stored + o_c - heavy + recent)
                tl.store(p_virtual + b_target, b_candidate, mask=m_c)
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
                op = ops + op_first * columns.OP
                if tl.load(op + columns.KIND) == _DRAW:
                    length, seen = tl.load(op + columns.LENGTH), tl.load(op + columns.SEEN)
                    draw = mix(
                        mix(mix(event, tl.load(op + columns.INDEX).to(tl.uint32)), _DRAWN), 0
                    )
                    entries = length + seen - tl.where(seen > 0, 1, 0)
                    # floor(u * entries) in integers: fp32 would round the product.
                    ticket = (((draw >> 8).to(tl.int64) * entries) >> 24).to(tl.int32)
                    ticket = tl.where(seen > 0, tl.maximum(ticket - seen + 1, 0), ticket)
                    drawn = tl.load(ids + tl.load(op + columns.INPUTS) + ticket)
                    p_drawn = p_virtual + drawn
                    if drawn >= base:
                        p_drawn = p_output + drawn - base
                    tl.store(p_output + tl.load(op + columns.OUTPUT) - base, tl.load(p_drawn))
                else:
                    mine = tl.minimum(member * G, op_count)
                    op += mine * columns.OP
                    op_count = tl.minimum(op_count - mine, G)
                    m_g = o_g < op_count
                    p_op = op + o_g * columns.OP
                    b_length = tl.load(p_op + columns.LENGTH, mask=m_g, other=0)
                    b_index = tl.load(p_op + columns.INDEX, mask=m_g, other=0).to(tl.uint32)
                    b_inputs = tl.load(p_op + columns.INPUTS, mask=m_g, other=0)
                    b_output = tl.load(p_op + columns.OUTPUT, mask=m_g, other=0)
                    b_op = mix(tl.zeros([G], tl.uint32) + event, b_index)
                    b_key = mix(b_op, tl.full([G], _SIGN, tl.uint32))
                    b_flip = mix(b_op, tl.full([G], _COMPLEMENT, tl.uint32))
                    b_flip = (mix(b_flip, tl.zeros([G], tl.uint32)) & 1).to(tl.int32)
                    bound2 = tl.full([], 0.0, tl.float32)
                    shift = bound2
                    mean2 = bound2
                    most_root = bound2
                    if TILES > 1 or KIND != 0:
                        bound2, shift, mean2 = measure(
                            tl.load(op + columns.LENGTH), ids + tl.load(op + columns.INPUTS),
                            p_virtual, p_output, base, p_mean, p_slots, p_table, s_page, s_slot,
                            D, D_PAD, P, BLOCK_SIZE, KIND,
                        )  # fmt: skip
                    longest = tl.max(b_length, 0)
                    for i_tile in range(tl.cdiv(longest, 2 * P)):
                        for g in range(op_count):
                            length, inputs = (
                                tl.load(op + g * columns.OP + columns.LENGTH),
                                tl.load(op + g * columns.OP + columns.INPUTS),
                            )
                            b_ka, b_va, b_na, b_ma, b_kb, b_vb, b_nb, b_mb = load_pairs(
                                i_tile * P, length, ids + inputs, p_virtual, p_output, base, p_mean,
                                p_slots, p_table, s_page, s_slot, D, D_PAD, P, BLOCK_SIZE, KIND,
                            )  # fmt: skip
                            if TILES == 1 and KIND == 0:
                                bound2 = tl.maximum(
                                    tl.max(tl.abs(b_va.to(tl.float32))),
                                    tl.max(tl.abs(b_vb.to(tl.float32))),
                                )
                                bound2 = bound2 * bound2
                            b_delta = own_tile(
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
                                for i_before in range(i_tile):
                                    c_ka, c_va, c_na, c_ma, c_kb, c_vb, c_nb, c_mb = load_pairs(
                                        i_before * P, length, ids + inputs, p_virtual, p_output,
                                        base, p_mean, p_slots, p_table, s_page, s_slot, D, D_PAD, P,
                                        BLOCK_SIZE, KIND,
                                    )  # fmt: skip
                                    b_cross = pair_tile(
                                        c_ka, c_va, c_na, c_ma, c_kb, c_vb, c_nb, c_mb,
                                        b_ka, b_va, b_na, b_ma, b_kb, b_vb, b_nb, b_mb,
                                        mean2, bound2, shift, root, KIND,
                                    )  # fmt: skip
                                    b_s = tl.load(p_sign + (g * TILES + i_before) * P + o_p)
                                    b_psi += tl.sum(b_s[:, None] * b_cross, 0)
                                tl.store(p_psi + g * P + o_p, b_psi)
                        tl.debug_barrier()
                        b_near_psi = tl.zeros([G, HALF], tl.float32)
                        b_far_psi = b_near_psi
                        if TILES > 1:
                            p_from = p_psi + o_g[:, None] * P + o_half[None, :]
                            b_near_psi = tl.load(p_from, mask=m_g[:, None], other=0.0)
                            b_far_psi = tl.load(p_from + HALF, mask=m_g[:, None], other=0.0)
                        b_sign, b_far_psi = walk_half(
                            p_delta, p_tau, b_near_psi, b_far_psi, b_key, i_tile * P,
                            G, P, HALF, 0, KIND,
                        )  # fmt: skip
                        keep(
                            b_sign, b_flip, i_tile, 0, b_length, ids + b_inputs, b_output - base,
                            m_g, p_virtual, p_output, base, p_sign, G, P, TILES,
                        )  # fmt: skip
                        b_sign, _ = walk_half(
                            p_delta, p_tau, b_far_psi, b_far_psi, b_key, i_tile * P,
                            G, P, HALF, 1, KIND,
                        )  # fmt: skip
                        keep(
                            b_sign, b_flip, i_tile, 1, b_length, ids + b_inputs, b_output - base,
                            m_g, p_virtual, p_output, base, p_sign, G, P, TILES,
                        )  # fmt: skip
                        tl.debug_barrier()
                meetings += TEAM
                meet(p_arrived, meetings, TEAM)
            p_new = p_old + heads * width
            for j in range(0, after, WIDE):
                o_j = j + tl.arange(0, WIDE)
                b_left = tl.load(ids + final + o_j, mask=o_j < after, other=0)
                b_final = entry(b_left, p_virtual, p_output, base, o_j < after)
                tl.store(p_new + o_j, b_final, mask=o_j < after)
            tl.debug_barrier()


@triton.jit
def meet(p_arrived, target, TEAM: tl.constexpr):
    """Wait until every member of the team is here; what they wrote before can be read after."""
    tl.debug_barrier()
    if TEAM > 1:
        tl.atomic_add(p_arrived, 1, sem="acq_rel", scope="gpu")
        while tl.atomic_add(p_arrived, 0, sem="acq_rel", scope="gpu") < target:
            pass
        tl.debug_barrier()


@triton.jit
def entry(b_id, p_virtual, p_output, base, m):
    """Source indices of virtual ids: a halving's outputs are shared, the others a program's own."""
    p_own = tl.where(b_id < base, p_virtual + b_id, p_output + (b_id - base))
    return tl.load(p_own, mask=m, other=0)


@triton.jit
def keep(
    b_sign, b_flip, i_tile, second, b_length, p_inputs, b_output, m_g, p_virtual, p_output, base,
    p_sign, G: tl.constexpr, P: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Of pair i the point 2 i + kept stays, as output i; half a tile of signs [G, P / 2]."""
    HALF: tl.constexpr = P // 2
    o_g, o_lane = tl.arange(0, G), tl.arange(0, HALF) + second * HALF
    if TILES > 1:
        o_sign = (o_g[:, None] * TILES + i_tile) * P + o_lane[None, :]
        tl.store(p_sign + o_sign, 2.0 * b_sign.to(tl.float32) - 1.0, mask=m_g[:, None])
    i_pair = i_tile * P + o_lane
    b_stay = (b_sign ^ 1) ^ b_flip[:, None]
    m_out = m_g[:, None] & (i_pair[None, :] < b_length[:, None] // 2)
    b_id = tl.load(p_inputs[:, None] + 2 * i_pair[None, :] + b_stay, mask=m_out, other=0)
    b_entry = entry(b_id, p_virtual, p_output, base, m_out)
    tl.store(p_output + b_output[:, None] + i_pair[None, :], b_entry, mask=m_out)


@triton.jit
def load_pairs(
    i_pair, length, p_ids, p_virtual, p_output, base, p_mean,
    p_slots, p_table, s_page, s_slot,
    D: tl.constexpr, D_PAD: tl.constexpr, P: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """First and second points of pairs [i_pair, i_pair + P): keys, values, norms, mean products."""
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    i_first = 2 * (i_pair + tl.arange(0, P))
    m = i_first < length
    i_a = entry(tl.load(p_ids + i_first, mask=m, other=0), p_virtual, p_output, base, m)
    i_b = entry(tl.load(p_ids + i_first + 1, mask=m, other=0), p_virtual, p_output, base, m)
    p_k = slot_rows(i_a, p_slots, p_table, s_page, s_slot, BLOCK_SIZE)
    b_ka, b_va, b_na, b_ma = load_points(p_k, p_k + D, m, p_mean, o_d, m_d, KIND)
    p_k = slot_rows(i_b, p_slots, p_table, s_page, s_slot, BLOCK_SIZE)
    b_kb, b_vb, b_nb, b_mb = load_points(p_k, p_k + D, m, p_mean, o_d, m_d, KIND)
    return b_ka, b_va, b_na, b_ma, b_kb, b_vb, b_nb, b_mb


@triton.jit
def measure(
    length, p_ids, p_virtual, p_output, base, p_mean, p_slots, p_table, s_page, s_slot,
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
            i_pair, length, p_ids, p_virtual, p_output, base, p_mean, p_slots, p_table, s_page,
            s_slot, D, D_PAD, P, BLOCK_SIZE, 0,
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
                i_pair, length, p_ids, p_virtual, p_output, base, p_mean, p_slots, p_table, s_page,
            s_slot, D, D_PAD, P, BLOCK_SIZE, 0,
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
