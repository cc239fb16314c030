"""Compaction kernel: which entries survive each event of a step, as lists of source indices.

Kept points are never modified, so a request's state after an event is a list of source indices
(`rows.py`) of its stored slots; the exact recent tokens after them are consecutive.  A persistent
team of programs per (layer, request, KV head) walks through the step's events; what does not depend
on earlier decisions (attention of the query rows to the recent tokens) is computed for all events
beforehand.

A team's members share out the slices of scores and the halvings of a round, meet, and repeat the
rest each for itself.  Within a program entries pass from phase to phase through scratch of its own;
a barrier orders writers before readers.  What is written for an event lies in one of two copies,
since a member may still read an event's while another one writes the next's.  No arithmetic depends
on the team's size: partial sums belong to slices, not to programs.

Source: Express Language Modeling (arXiv 2606.10944); `reference.cache.ExpressCache` is the oracle.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from express_vllm.rng import STREAM_DRAW
from express_vllm.schedules import DRAW

from .arguments import Heads, Logits, Scores, Source, Tables, Work
from .columns import EVENT, OP, REQUEST, ROUND
from .halving import Entries, Scratch, differences, entry, keep, load_groups, points, walk
from .launch import kernel
from .long_groups import halve_long
from .rows import ROWS, event_key, mix, source_slots, wide
from .selection import choose_heavy, score_stored, weigh
from .team import Team, meet, written

_DRAWN, _DRAW = tl.constexpr(STREAM_DRAW), tl.constexpr(DRAW)


class Task(NamedTuple):
    """A layer, request and KV head."""

    i_layer: Any
    i_head: Any
    layer: Any  # global, of the random bits, as is `head`
    head: Any
    request: Any  # pointer to its record
    slots: Any
    lists: Any  # pointer to its first list
    width: Any  # from a list to the next one
    progress: Any  # pointer to the number of its lists that are written


class Shared(NamedTuple):
    """What a team's members share: pointers."""

    parts: Any  # fp32 [2, slices, 2, ROWS]: maxima and sums of every slice
    outputs: Any  # int32 [2, output_width]: of halvings
    bits: Any  # int32: the candidates' masses


@kernel
def compact_kernel(
    tables: Tables, scores: Scores, source: Source, work: Work, heads: Heads,
    logits: Logits, root: float,  # 1 / sqrt(d) of the halving kernel
    C: tl.constexpr,
):  # fmt: skip
    """Work off the events of every request, layer and KV head: a team takes one after the other."""
    i_team = tl.program_id(0) // work.team
    team = Team(tl.program_id(0) % work.team, work.team, work.counters + 1 + i_team)
    p_virtuals = work.virtual + tl.program_id(0).to(tl.int64) * (2 * wide(work.virtual_width))
    scratch = own_scratch(work, C)
    shared = shared_scratch(work, i_team, C)
    meetings = 0
    # Attention runs at the same time as events of a step with new tokens.
    if C.block_size == 0:
        tl.atomic_add(work.counters, 1, sem="relaxed")
    for i_task in range(i_team, heads.tasks, tl.num_programs(0) // work.team):
        task = load_task(tables, source, work, heads, i_task, C)
        first_event = tl.load(task.request + REQUEST.first_event).to(tl.int32)
        event_count = tl.load(task.request + REQUEST.events).to(tl.int32)
        begin(task, p_virtuals, team, C)
        for e in range(event_count):
            meetings = run_event(
                task, first_event + e, e, tables, scores, heads, work, team, p_virtuals, scratch,
                shared, meetings, logits, root, C,
            )  # fmt: skip


@triton.jit
def own_scratch(work, C: tl.constexpr):
    """A program's scratch: differences, thresholds, psi, mean key, signs."""
    p_delta = work.scratch + tl.program_id(0).to(tl.int64) * wide(work.scratch_width)
    p_tau = p_delta + C.halvings * C.pairs * C.pairs
    p_psi = p_tau + C.halvings * C.pairs
    p_mean = p_psi + C.halvings * C.pairs
    return Scratch(p_delta, p_tau, p_psi, p_mean, p_mean + C.padded)


@triton.jit
def shared_scratch(work, i_team, C: tl.constexpr):
    p_parts = work.shared + i_team.to(tl.int64) * wide(work.shared_width)
    p_outputs = (p_parts + 4 * ROWS * C.slices).to(tl.pointer_type(tl.int32))
    return Shared(p_parts, p_outputs, p_outputs + 2 * wide(work.output_width))


@triton.jit
def load_task(tables, source, work, heads, i_task, C: tl.constexpr):
    i_head = i_task % heads.heads
    i_request = (i_task // heads.heads) % heads.requests
    request = tables.requests + i_request * REQUEST.words
    i_layer = i_task // (heads.heads * heads.requests)
    list_first, width = tl.load(request + REQUEST.list), tl.load(request + REQUEST.width)
    p_layer = source.data + tl.multiple_of(tl.load(source.layer_offsets + i_layer), 16)
    slots = source_slots(p_layer, source, request, i_head, C.block_size)
    layer = (heads.first_layer + tl.load(heads.layer_ids + i_layer)).to(tl.uint32)
    p_lists = work.lists + (i_layer.to(tl.int64) * work.entries + list_first) * heads.heads
    return Task(
        i_layer, i_head, layer, (heads.first_head + i_head).to(tl.uint32), request, slots,
        p_lists + i_head * width, heads.heads * width,
        work.progress + i_request * heads.heads + i_head,
    )  # fmt: skip


@triton.jit
def begin(task, p_virtuals, team, C: tl.constexpr):
    """The state before the first event: the stored slots as they are."""
    known = tl.load(task.request + REQUEST.known).to(tl.int32)
    for j in range(0, known, C.wide):
        o_j = j + tl.arange(0, C.wide)
        tl.store(p_virtuals + o_j, o_j, mask=o_j < known)
        tl.store(task.lists + o_j, o_j, mask=o_j < tl.where(team.member == 0, known, 0))
    tl.debug_barrier()
    if C.block_size == 0:
        written(task.progress, 1, team)


@triton.jit
def run_event(
    task, i_event, e, tables, scores, heads, work, team, p_virtuals, scratch, shared, meetings,
    logits, root, C: tl.constexpr,
):  # fmt: skip
    """Run a task's event e, the step's `i_event`, and write its list -> the team's meetings."""
    event = tables.events + i_event * EVENT.words
    position, stored = tl.load(event + EVENT.position), tl.load(event + EVENT.stored)
    incoming, live = tl.load(event + EVENT.incoming), tl.load(event + EVENT.live)
    after = tl.load(event + EVENT.after)
    round_first, round_count = tl.load(event + EVENT.round), tl.load(event + EVENT.rounds)
    final = tl.load(event + EVENT.final)
    # From a slot to its source index.
    recent = (tl.load(task.request + REQUEST.shift) + position - live).to(tl.int32)
    copy = e % 2
    entries = Entries(
        p_virtuals + copy * wide(work.virtual_width),
        shared.outputs + copy * wide(work.output_width), stored + incoming,
    )  # fmt: skip
    # Ids are known before any decision: they are on their way while scores are computed.
    b_id = first_points(tables, round_first, round_count, team, C)
    o_w = tl.arange(0, C.wide)
    b_left = tl.load(tables.ids + final + o_w, mask=o_w < after, other=0)
    if C.heavy:
        meetings = select(
            task, event, i_event, recent, entries.virtual, tables, scores, heads, team,
            shared.parts + copy * (2 * ROWS * C.slices), shared.bits, meetings, logits, C,
        )  # fmt: skip
    else:
        for j in range(0, incoming, C.wide):
            o_j = stored + j + o_w
            tl.store(entries.virtual + o_j, o_j + recent, mask=o_j < entries.base)
        tl.debug_barrier()
    key = random_key(task, position)
    for i_round in range(round_first, round_first + round_count):
        run_round(
            tables, i_round, i_round > round_first, b_id, key, entries, task.slots, team, scratch,
            root, C,
        )  # fmt: skip
        meetings += team.size
        meet(team, meetings)
    p_next = p_virtuals + (1 - copy) * wide(work.virtual_width)
    finish(task, e, b_left, tables.ids + final, after, entries, p_next, team, C)
    return meetings


@triton.jit
def first_points(tables, round_first, round_count, team, C: tl.constexpr):
    """`points` of a member's first groups in an event."""
    p_round = tables.rounds + round_first * ROUND.words
    op_first = tl.load(p_round + ROUND.first_op, mask=round_count > 0, other=0)
    op_count = tl.load(p_round + ROUND.ops, mask=round_count > 0, other=0)
    first = team.member * C.halvings
    return points(tables.ops + (op_first + first) * OP.words, op_count - first, tables.ids, C)


@triton.jit
def select(
    task, event, i_event, recent, p_virtual, tables, scores, heads, team, p_part, p_bits, meetings,
    logits, C: tl.constexpr,
):  # fmt: skip
    """Choose an event's heavy hitters: rewrite the virtual ids -> the team's meetings."""
    stored, incoming = tl.load(event + EVENT.stored), tl.load(event + EVENT.incoming)
    sinks, heavy = tl.load(event + EVENT.sinks), tl.load(event + EVENT.heavy)
    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, C.padded)
    i_row = (task.i_layer * scores.events + i_event).to(tl.int64) * heads.heads + task.i_head
    i_row = i_row * ROWS
    i_score = task.i_layer.to(tl.int64) * scores.scored + tl.load(event + EVENT.score)
    i_score = i_score * heads.heads + task.i_head * tl.load(event + EVENT.room)
    b_q = tl.load(
        scores.rows + (i_row + o_r[:, None]) * C.size + o_d[None, :],
        mask=(o_d < C.size)[None, :], other=0.0,
    )  # fmt: skip
    p_score = scores.score + i_score * ROWS
    score_stored(
        b_q, p_virtual, tables.bias + tl.load(event + EVENT.bias), task.slots, p_score, p_part,
        logits, team, stored, sinks, heavy, C,
    )  # fmt: skip
    meetings += team.size
    meet(team, meetings)
    weigh(
        p_score, p_part, scores.peak + i_row, scores.total + i_row, p_bits, heavy + incoming, team,
        C,
    )  # fmt: skip
    meetings += team.size
    meet(team, meetings)
    choose_heavy(p_bits, p_virtual, recent, stored, incoming, sinks, heavy, C)
    return meetings


@triton.jit
def random_key(task, position):
    return event_key(
        tl.load(task.request + REQUEST.seed_low).to(tl.uint32),
        tl.load(task.request + REQUEST.seed_high).to(tl.uint32), task.layer, task.head,
        position.to(tl.uint32),
    )  # fmt: skip


@triton.jit
def run_round(
    tables, i_round, later, b_id, key, entries, slots, team, scratch, root, C: tl.constexpr
):  # fmt: skip
    """A member's operations of a round; b_id: `points` of the first ones, if it is not a `later`
    round of the event."""
    p_round = tables.rounds + i_round * ROUND.words
    op_first, op_count = tl.load(p_round + ROUND.first_op), tl.load(p_round + ROUND.ops)
    op = tables.ops + op_first * OP.words
    if tl.load(op + OP.kind) == _DRAW:
        draw_entry(op, key, tables.ids, entries)
    else:
        first_own = team.member * C.halvings
        for first in range(first_own, op_count, team.size * C.halvings):
            if later | (first > first_own):
                b_id = points(op + first * OP.words, op_count - first, tables.ids, C)
            halve(
                op + first * OP.words, op_count - first, b_id, key, tables.ids, entries, slots,
                scratch, root, C,
            )  # fmt: skip


@triton.jit
def halve(op, count, b_id, key, ids, entries, slots, scratch, root, C: tl.constexpr):
    """Run up to G halvings of a round, the first `count` from `op` on.  b_id: `points` of the
    first."""
    groups = load_groups(op, count, key, C)
    if C.long:
        halve_long(op, groups, ids, entries, slots, scratch, root, C)
    else:
        b_psi = tl.zeros([C.halvings, C.pairs], tl.float32)
        for g in range(0, tl.minimum(count, C.halvings), C.together):
            left = tl.minimum(count, C.halvings) - g - C.together
            b_next = points(op + (g + C.together) * OP.words, left, ids, C)
            p_delta = scratch.delta + g * (C.pairs * C.pairs)
            differences(b_id, count - g, entries, slots, p_delta, root, C)
            b_id = b_next
        tl.debug_barrier()
        b_sign = walk(scratch, b_psi, groups.key, 0, C)
        keep(b_sign, 0, groups, ids, entries, scratch, C)
        tl.debug_barrier()


@triton.jit
def draw_entry(op, key, ids, entries):
    """Draw one of a range's entries: entry 0 counts `seen` times if `seen` > 0, the rest once."""
    length, seen = tl.load(op + OP.length), tl.load(op + OP.seen)
    draw = mix(mix(mix(key, tl.load(op + OP.number).to(tl.uint32)), _DRAWN), 0)
    count = length + seen - tl.where(seen > 0, 1, 0)
    # floor(u * count) in integers: fp32 would round the product.
    ticket = (((draw >> 8).to(tl.int64) * count) >> 24).to(tl.int32)
    ticket = tl.where(seen > 0, tl.maximum(ticket - seen + 1, 0), ticket)
    drawn = tl.load(ids + tl.load(op + OP.inputs) + ticket)
    p_drawn = entries.virtual + drawn
    if drawn >= entries.base:
        p_drawn = entries.output + drawn - entries.base
    tl.store(entries.output + tl.load(op + OP.output) - entries.base, tl.load(p_drawn))


@triton.jit
def finish(task, e, b_left, p_final, after, entries, p_next, team, C: tl.constexpr):
    """Write the list after event e, also to the next event's virtual ids; b_left: its first ids."""
    p_new = task.lists + (e + 1) * task.width
    for j in range(0, after, C.wide):
        o_j = j + tl.arange(0, C.wide)
        m_j = o_j < after
        if j > 0:
            b_left = tl.load(p_final + o_j, mask=m_j, other=0)
        b_final = entry(b_left, entries, m_j)
        tl.store(p_next + o_j, b_final, mask=m_j)
        tl.store(p_new + o_j, b_final, mask=o_j < tl.where(team.member == 0, after, 0))
    tl.debug_barrier()
    if C.block_size == 0:
        written(task.progress, e + 2, team)
