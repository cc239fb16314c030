"""Compaction kernel: which entries survive each event of a step, as lists of source indices.

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

from express_vllm.layout import DRAW
from express_vllm.rng import STREAM_COMPLEMENT, STREAM_DRAW, STREAM_SIGN

from .columns import EVENT, OP, REQUEST, ROUND
from .halving import differences, entry, keep, long_tile, measure, points, walk
from .launch import kernel
from .rows import event_key, mix, request_slots, wait_until, wide
from .selection import ROWS, choose_heavy, score_stored, weigh

_SIGN, _COMPLEMENT = tl.constexpr(STREAM_SIGN), tl.constexpr(STREAM_COMPLEMENT)
_DRAWN, _DRAW = tl.constexpr(STREAM_DRAW), tl.constexpr(DRAW)


@kernel
def compact_kernel(
    requests, events, rounds, ops, ids, bias,
    rows, score, peak, total,
    pages, layer_offsets, table,
    lists,  # int32 out [L, H * list_entries]: a request's lists [EVENTS + 1, H, WIDTH] at H * LIST,
    # the first one before its events
    scratch, virtual,  # fp32 [programs, scratch_width], int32 [programs, 2, virtual_width]
    shared,  # fp32 [teams, shared_width]: what a team's members share
    counters,  # int32 zeros: programs that started, then the teams' meetings
    progress,  # int32 out [R, H], zeros before: lists that are written, for one layer
    s_value: tl.int64, s_page: tl.int64, s_head: tl.int64, s_slot: tl.int32, s_table: tl.int32,
    scale, root,  # softmax scale; 1 / sqrt(D) of the halving kernel
    tasks: tl.int32, request_count: tl.int32, heads: tl.int32, first_head: tl.int32,
    first_layer: tl.int32, layer_ids,
    instances: tl.int32, list_entries: tl.int32, scored: tl.int32,  # of a layer
    scratch_width: tl.int32, virtual_width: tl.int32, output_width: tl.int32,
    shared_width: tl.int32, team: tl.int32,
    origin: tl.int32,  # column of a request's first row, not paged
    D: tl.constexpr, D_PAD: tl.constexpr,
    C: tl.constexpr,  # candidates that are in registers at a time
    SHARE: tl.constexpr,  # candidates that a member weighs at a time
    SLICES: tl.constexpr,  # parts of the stored slots: they order a sum
    BLOCK: tl.constexpr,
    G: tl.constexpr,  # halvings of a round that a program runs side by side
    B: tl.constexpr,  # of these, how many share a matrix product
    P: tl.constexpr, BLOCK_SIZE: tl.constexpr, HAS_HEAVY: tl.constexpr, KIND: tl.constexpr,
    LONG: tl.constexpr,  # groups of any number of tiles, one at a time
    WIDE: tl.constexpr,
):  # fmt: skip
    """Work off the events of every request, layer and KV head.

    A team of `team` programs takes one of them: its members share out the slices of scores and the
    halvings of a round, meet, and repeat the rest each for itself.  Within a program entries pass
    from phase to phase through scratch of its own; a barrier orders writers before readers.  What
    is written for an event lies in one of two copies, since a member may still read an event's
    while another one writes the next's.  No arithmetic depends on `team`: partial sums belong to
    slices, not to programs.
    """
    # Attention runs at the same time as events of a step with new tokens.
    SIGNAL: tl.constexpr = BLOCK_SIZE == 0
    o_d, o_r, o_w = tl.arange(0, D_PAD), tl.arange(0, ROWS), tl.arange(0, WIDE)
    scratch_width = wide(scratch_width)
    virtual_width = wide(virtual_width)
    output_width = wide(output_width)
    shared_width = wide(shared_width)
    i_team, member = tl.program_id(0) // team, tl.program_id(0) % team
    p_virtuals = virtual + tl.program_id(0).to(tl.int64) * (2 * virtual_width)
    # Own scratch: differences, thresholds, psi, mean key, signs.
    p_delta = scratch + tl.program_id(0).to(tl.int64) * scratch_width
    p_tau = p_delta + G * P * P
    p_psi = p_tau + G * P
    p_mean = p_psi + G * P
    p_sign = p_mean + D_PAD
    # Shared: maxima and sums of every slice, the halvings' outputs, masses.
    p_parts = shared + i_team.to(tl.int64) * shared_width
    p_outputs = (p_parts + 4 * ROWS * SLICES).to(tl.pointer_type(tl.int32))
    p_bits = p_outputs + 2 * output_width
    p_arrived = counters + 1 + i_team
    meetings = 0
    if SIGNAL:
        tl.atomic_add(counters, 1, sem="relaxed")
    for task in range(i_team, tasks, tl.num_programs(0) // team):
        i_head = task % heads
        i_request = (task // heads) % request_count
        request = requests + i_request * REQUEST.words
        i_layer = task // (heads * request_count)
        instance_first = tl.load(request + REQUEST.first_event).to(tl.int32)
        event_count = tl.load(request + REQUEST.events).to(tl.int32)
        move = tl.load(request + REQUEST.shift)
        seed_low, seed_high = (
            tl.load(request + REQUEST.seed_low).to(tl.uint32),
            tl.load(request + REQUEST.seed_high).to(tl.uint32),
        )
        i_table = tl.load(request + REQUEST.blocks)
        list_first, width = tl.load(request + REQUEST.list), tl.load(request + REQUEST.width)
        p_slots = request_slots(
            pages + tl.multiple_of(tl.load(layer_offsets + i_layer), 16), request, i_head, s_head,
            s_slot, origin, BLOCK_SIZE,
        )  # fmt: skip
        p_table = table + i_table * s_table
        layer = (first_layer + tl.load(layer_ids + i_layer)).to(tl.uint32)
        p_list = lists + (i_layer.to(tl.int64) * list_entries + list_first) * heads
        p_list += i_head * width
        # The state before the first event: the stored slots as they are.
        known = tl.load(request + REQUEST.known).to(tl.int32)
        p_progress = progress + i_request * heads + i_head
        for j in range(0, known, WIDE):
            o_j = j + o_w
            tl.store(p_virtuals + o_j, o_j, mask=o_j < known)
            tl.store(p_list + o_j, o_j, mask=o_j < tl.where(member == 0, known, 0))
        tl.debug_barrier()
        if SIGNAL:
            written(p_progress, 1, member)
        for e in range(event_count):
            header = events + (instance_first + e) * EVENT.words
            position, stored = tl.load(header + EVENT.position), tl.load(header + EVENT.stored)
            incoming, live = tl.load(header + EVENT.incoming), tl.load(header + EVENT.live)
            after, round_first = tl.load(header + EVENT.after), tl.load(header + EVENT.round)
            round_count, final = tl.load(header + EVENT.rounds), tl.load(header + EVENT.final)
            recent = (move + position - live).to(tl.int32)
            copy = e % 2
            p_virtual = p_virtuals + copy * virtual_width
            p_output = p_outputs + copy * output_width
            base = stored + incoming  # virtual ids from here on are outputs
            # Ids are known before any decision: they are on their way while scores are computed.
            p_round = rounds + round_first * ROUND.words
            op_first = tl.load(p_round + ROUND.first_op, mask=round_count > 0, other=0) + member * G
            op_count = tl.load(p_round + ROUND.ops, mask=round_count > 0, other=0) - member * G
            b_id = points(ops + op_first * OP.words, op_count, ids, P, B)
            b_left = tl.load(ids + final + o_w, mask=o_w < after, other=0)
            if HAS_HEAVY:
                sinks, heavy = tl.load(header + EVENT.sinks), tl.load(header + EVENT.heavy)
                i_row = (i_layer * instances + instance_first + e).to(tl.int64) * heads + i_head
                i_row = i_row * ROWS
                i_score = (i_layer.to(tl.int64) * scored + tl.load(header + EVENT.score)) * heads
                i_score += i_head * tl.load(header + EVENT.room)
                b_q = tl.load(
                    rows + (i_row + o_r[:, None]) * D + o_d[None, :],
                    mask=(o_d < D)[None, :], other=0.0,
                )  # fmt: skip
                p_part = p_parts + copy * (2 * ROWS * SLICES)
                p_score = score + i_score * ROWS
                score_stored(
                    b_q, p_virtual, bias + tl.load(header + EVENT.bias), p_slots, p_table, s_page,
                    s_slot, p_score, p_part, scale, member, team, stored, sinks, heavy,
                    D, D_PAD, BLOCK, SLICES, BLOCK_SIZE,
                )  # fmt: skip
                meetings += team
                meet(p_arrived, meetings, team)
                weigh(
                    p_score, p_part, peak + i_row, total + i_row, p_bits, heavy + incoming, member,
                    team, C, SHARE, SLICES,
                )  # fmt: skip
                meetings += team
                meet(p_arrived, meetings, team)
                choose_heavy(
                    p_bits, p_virtual, recent, stored, incoming, sinks, heavy, C
                )  # fmt: skip
            else:
                for j in range(0, incoming, WIDE):
                    o_j = stored + j + o_w
                    tl.store(p_virtual + o_j, o_j + recent, mask=o_j < base)
                tl.debug_barrier()

            event = event_key(
                seed_low, seed_high, layer, (first_head + i_head).to(tl.uint32),
                position.to(tl.uint32),
            )  # fmt: skip
            for i_round in range(round_first, round_first + round_count):
                p_round = rounds + i_round * ROUND.words
                op_first = tl.load(p_round + ROUND.first_op)
                op_count = tl.load(p_round + ROUND.ops)
                op = ops + op_first * OP.words
                if tl.load(op + OP.kind) == _DRAW:
                    draw_entry(op, event, ids, p_virtual, p_output, base)
                else:
                    for first in range(member * G, op_count, team * G):
                        if (i_round > round_first) | (first > member * G):
                            b_id = points(op + first * OP.words, op_count - first, ids, P, B)
                        halve(
                            op + first * OP.words, op_count - first, b_id, event, ids, p_virtual,
                            p_output, base, p_slots, p_table, s_value, s_page, s_slot, p_delta,
                            p_tau, p_psi, p_mean, p_sign, root, D, D_PAD, G, B, P, BLOCK_SIZE, KIND,
                            LONG,
                        )  # fmt: skip
                meetings += team
                meet(p_arrived, meetings, team)
            p_new = p_list + (e + 1) * heads * width
            p_next = p_virtuals + (1 - copy) * virtual_width
            for j in range(0, after, WIDE):
                o_j = j + o_w
                m_j = o_j < after
                if j > 0:
                    b_left = tl.load(ids + final + o_j, mask=m_j, other=0)
                b_final = entry(b_left, p_virtual, p_output, base, m_j)
                tl.store(p_next + o_j, b_final, mask=m_j)
                tl.store(p_new + o_j, b_final, mask=o_j < tl.where(member == 0, after, 0))
            tl.debug_barrier()
            if SIGNAL:
                written(p_progress, e + 2, member)


@triton.jit
def halve(
    op, count, b_id, event, ids, p_virtual, p_output, base, p_slots, p_table, s_value, s_page,
    s_slot, p_delta, p_tau, p_psi, p_mean, p_sign, root,
    D: tl.constexpr, D_PAD: tl.constexpr, G: tl.constexpr, B: tl.constexpr, P: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KIND: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Run up to G halvings of a round, the first `count` from `op` on.  b_id: `points` of the first
    B."""
    o_g, o_p = tl.arange(0, G), tl.arange(0, P)
    m_g = o_g < count
    p_op = op + o_g * OP.words
    b_length = tl.load(p_op + OP.length, mask=m_g, other=0)
    b_index = tl.load(p_op + OP.number, mask=m_g, other=0).to(tl.uint32)
    b_inputs = tl.load(p_op + OP.inputs, mask=m_g, other=0)
    b_output = tl.load(p_op + OP.output, mask=m_g, other=0)
    b_op = mix(tl.zeros([G], tl.uint32) + event, b_index)
    b_key = mix(b_op, tl.full([G], _SIGN, tl.uint32))
    b_flip = mix(b_op, tl.full([G], _COMPLEMENT, tl.uint32))
    b_flip = (mix(b_flip, tl.zeros([G], tl.uint32)) & 1).to(tl.int32)
    b_psi = tl.zeros([G, P], tl.float32)
    if LONG:
        length = tl.load(op + OP.length)
        bound2, shift, mean2 = measure(
            length, ids + tl.load(op + OP.inputs), p_virtual, p_output, base, p_mean, p_slots,
            p_table, s_value, s_page, s_slot, D, D_PAD, P, BLOCK_SIZE, KIND,
        )  # fmt: skip
        most_root = tl.full([], 0.0, tl.float32)
        for i_tile in range(tl.cdiv(length, 2 * P)):
            most_root = long_tile(
                op, i_tile, ids, p_virtual, p_output, base, p_mean, p_slots, p_table, s_value,
                s_page, s_slot, p_delta, p_tau, p_psi, p_sign, bound2, shift, mean2, most_root,
                root, D, D_PAD, P, BLOCK_SIZE, KIND,
            )  # fmt: skip
            tl.debug_barrier()
            b_psi = tl.load(p_psi + o_g[:, None] * P + o_p[None, :], mask=m_g[:, None], other=0.0)
            b_sign = walk(p_delta, p_tau, b_psi, b_key, i_tile * P, G, P, KIND)
            keep(
                b_sign, b_flip, i_tile, b_length, ids + b_inputs, b_output - base, m_g, p_virtual,
                p_output, base, p_sign, G, P, LONG,
            )  # fmt: skip
            tl.debug_barrier()
    else:
        for g in range(0, tl.minimum(count, G), B):
            b_next = points(op + (g + B) * OP.words, tl.minimum(count, G) - g - B, ids, P, B)
            differences(
                b_id, count - g, p_virtual, p_output, base, p_slots, p_table, s_value, s_page,
                s_slot, p_delta + g * (P * P), root, D, D_PAD, P, B, BLOCK_SIZE,
            )  # fmt: skip
            b_id = b_next
        tl.debug_barrier()
        b_sign = walk(p_delta, p_tau, b_psi, b_key, 0, G, P, KIND)
        keep(
            b_sign, b_flip, 0, b_length, ids + b_inputs, b_output - base, m_g, p_virtual, p_output,
            base, p_sign, G, P, LONG,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def meet(p_arrived, target, team):
    """Wait until every member of the team is here; what they wrote before can be read after."""
    tl.debug_barrier()
    if team > 1:
        tl.atomic_add(p_arrived, 1, sem="release", scope="gpu")
        wait_until(p_arrived, target)


@triton.jit
def written(p_progress, lists, member):
    """Tell attention, which runs at the same time, that so many lists of this head are there."""
    if member == 0:
        tl.atomic_xchg(p_progress, lists, sem="release", scope="gpu")


@triton.jit
def draw_entry(op, event, ids, p_virtual, p_output, base):
    """Draw one of a range's entries: entry 0 counts `seen` times if `seen` > 0, the rest once."""
    length, seen = tl.load(op + OP.length), tl.load(op + OP.seen)
    draw = mix(mix(mix(event, tl.load(op + OP.number).to(tl.uint32)), _DRAWN), 0)
    entries = length + seen - tl.where(seen > 0, 1, 0)
    # floor(u * entries) in integers: fp32 would round the product.
    ticket = (((draw >> 8).to(tl.int64) * entries) >> 24).to(tl.int32)
    ticket = tl.where(seen > 0, tl.maximum(ticket - seen + 1, 0), ticket)
    drawn = tl.load(ids + tl.load(op + OP.inputs) + ticket)
    p_drawn = p_virtual + drawn
    if drawn >= base:
        p_drawn = p_output + drawn - base
    tl.store(p_output + tl.load(op + OP.output) - base, tl.load(p_drawn))
