"""Scores of a step's events on their recent tokens, all at once: they need no earlier decision."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from express_vllm.shape import RING_ROWS
from express_vllm.softmax import Softmax

from . import constants
from .arguments import Logits, Pages, Scores, Source, Tables, Tokens
from .columns import EVENT, REQUEST
from .constants import Model
from .launch import kernel, launch
from .logits import sink_logits, to_logits
from .plan import StepPlan
from .rows import ROWS, Slots, load_queries, ring_rows, slot_rows, source_slots, wide

LOW = tl.constexpr(-1.0e30)


@kernel
def score_recent_kernel(
    query: Tokens,  # of the step
    ring: Pages,  # their last slots hold earlier query rows
    scores: Scores,  # out
    tables: Tables, source: Source, logits: Logits, heads: tl.int32,
    C: tl.constexpr,
):  # fmt: skip
    """An event's query rows, their attention scores on its incoming tokens, and the maximum and sum
    of exponentials over all its recent tokens, causal, and their heads' sinks."""
    i_event, i_head, i_layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    event = tables.events + i_event * EVENT.words
    request = tables.requests + tl.load(event + EVENT.request) * REQUEST.words
    layer_offset = tl.multiple_of(tl.load(source.layer_offsets + i_layer), 16)
    slots = source_slots(source.data + layer_offset, source, request, i_head, C.block_size)
    kept = Slots(
        ring.data + layer_offset + i_head * wide(ring.head), slots.blocks, ring.page, ring.slot, 0
    )
    b_q = event_queries(query, kept, request, event, i_head, C)
    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, C.padded)
    i_row = ((i_layer * scores.events + i_event).to(tl.int64) * heads + i_head) * ROWS
    p_row = scores.rows + (i_row + o_r[:, None]) * C.size + o_d[None, :]
    tl.store(p_row, b_q, mask=(o_d < C.size)[None, :])
    i_score = (i_layer.to(tl.int64) * scores.scored + tl.load(event + EVENT.score)) * heads
    i_score += i_head * tl.load(event + EVENT.room)
    b_peak, b_total = score_recent_slots(
        b_q, slots, request, event, scores.score + i_score * ROWS, logits, C
    )
    b_most = tl.max(b_peak, 1)
    b_sum = tl.sum(b_total * tl.exp(b_peak - b_most[:, None]), 1)
    if C.sinks:  # once: the stored slots are counted elsewhere
        b_sink = sink_logits(logits, i_layer, i_head * C.group + o_r % C.group)
        b_top = tl.maximum(b_most, b_sink)
        b_sum = b_sum * tl.exp(b_most - b_top) + tl.exp(b_sink - b_top)
        b_most = b_top
    tl.store(scores.peak + i_row + o_r, b_most)
    tl.store(scores.total + i_row + o_r, b_sum)


@triton.jit
def event_queries(query, kept, request, event, i_head, C: tl.constexpr):
    """Query rows [ROWS, d] of an event: from the ring those before the step, from the step the
    others.  kept: slots of the ring's pages."""
    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, C.padded)
    count = tl.load(event + EVENT.kept)
    m_ring = o_r < count
    ring = tl.load(request + REQUEST.ring).to(tl.int32)
    p_ring = ring_rows(kept, ring, m_ring, C, C.ring_block)
    m = m_ring[:, None] & (o_d < C.size)[None, :]
    b_q = tl.load(p_ring[:, None] + o_d[None, :], mask=m, other=0.0)
    if C.has_new:
        i_token = (tl.load(event + EVENT.query) + o_r).to(tl.int64)
        b_new = load_queries(query, i_token, i_head, o_r >= count, b_q.dtype, C)
        b_q = tl.where(m_ring[:, None], b_q, b_new)
    return b_q


@triton.jit
def score_recent_slots(b_q, slots, request, event, p_score, logits, C: tl.constexpr):
    """Scores of the incoming tokens, to p_score, and the maximum and sum of exponentials of all
    recent ones, one of each for every column of a tile [ROWS, BLOCK]."""
    position, stored = tl.load(event + EVENT.position), tl.load(event + EVENT.stored)
    incoming, live = tl.load(event + EVENT.incoming), tl.load(event + EVENT.live)
    # From a slot to its source index.
    recent = (tl.load(request + REQUEST.shift) + position - live).to(tl.int32)
    heavy = tl.load(event + EVENT.heavy)
    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, C.padded)
    b_peak = tl.full([ROWS, C.block], LOW, tl.float32)
    b_total = tl.zeros([ROWS, C.block], tl.float32)
    for first in range(stored, live, C.block):
        i_slot = first + tl.arange(0, C.block)
        m_slot = i_slot < live
        p_k = slot_rows(tl.where(m_slot, i_slot, stored) + recent, slots, C.block_size)
        b_k = tl.load(p_k[:, None] + o_d[None, :], mask=(o_d < C.size)[None, :], other=0.0)
        b_score = to_logits(tl.dot(b_q, tl.trans(b_k), input_precision="tf32x3"), logits, C)
        m_seen = i_slot[None, :] <= live - ROWS + o_r[:, None]
        b_score = tl.where(m_seen, b_score, LOW)
        i_candidate = heavy + i_slot - stored
        p_here = p_score + i_candidate[None, :] * ROWS + o_r[:, None]
        tl.store(p_here, b_score, mask=(i_slot < stored + incoming)[None, :])
        b_new = tl.maximum(b_peak, b_score)
        b_total = b_total * tl.exp(b_peak - b_new) + tl.where(m_seen, tl.exp(b_score - b_new), 0.0)
        b_peak = b_new
    return b_peak, b_total


def make_scores(step: StepPlan, heads: int, size: int, layers: int, dtype: torch.dtype) -> Scores:
    """In the step's memory; tensors of one element if it needs no scores."""
    extent, empty, f32 = step.extent, step.memory.empty, torch.float32
    counts = extent.instances, extent.scored
    if not (step.kind and step.kind.heavy):
        none = empty(1, dtype=f32)
        return Scores(empty(1, dtype=dtype), none, none, none, *counts)
    leading = (layers, extent.instances, heads)
    peak, total = empty(2, *leading, RING_ROWS, dtype=f32)
    return Scores(
        empty(*leading, RING_ROWS, size, dtype=dtype),
        empty(layers, heads * extent.scored, RING_ROWS, dtype=f32), peak, total, *counts,
    )  # fmt: skip


def score_recent(
    step: StepPlan, query: Tensor | None, kv_cache: Tensor, source: Source, layers: int,
    softmax: Softmax, group: int,
) -> Scores:  # fmt: skip
    """query [T, heads, d]: None without new tokens; kv_cache: the first layer's pages."""
    heads, size = kv_cache.shape[1], kv_cache.shape[3] // 2
    scores = step.kept(
        ("scores", layers), lambda: make_scores(step, heads, size, layers, kv_cache.dtype)
    )
    if not (step.kind and step.kind.heavy):
        return scores
    launch(
        score_recent_kernel, (step.extent.instances, heads, layers),
        (
            Tokens.of(kv_cache if query is None else query), Pages.of(kv_cache, source.table),
            scores, step.tables, source, Logits.of(softmax, step.zero), heads,
        ),
        constants.recent_scores(Model.of(kv_cache, group, softmax), query is None),
    )  # fmt: skip
    return scores
