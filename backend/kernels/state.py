"""A request's state after a chunk, written to its pages: the slots that are kept, the new tokens,
and the query rows that the event after the step will need."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import constants
from .arguments import Pages, Source, Tokens
from .columns import REQUEST
from .constants import Model
from .dense import movers
from .launch import kernel, launch
from .plan import StepPlan
from .rows import ROWS, load_queries, page_slots, ring_rows, slot_rows, source_slots


@triton.jit
def keep_rows(query, slots, request, i_head, C: tl.constexpr):
    """Store in the ring the step's query rows that the event after the step will need."""
    ring = tl.load(request + REQUEST.ring).to(tl.int32)
    start = tl.load(request + REQUEST.old) - tl.load(request + REQUEST.shift)
    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, C.padded)
    position = tl.load(request + REQUEST.ring_start) + o_r
    m = (position >= start) & (position < tl.where(ring >= 0, tl.load(request + REQUEST.stop), 0))
    i_token = tl.load(request + REQUEST.token) + position - start
    b_row = load_queries(query, i_token, i_head, m, slots.first.dtype.element_ty, C)
    p_row = ring_rows(slots, ring, m, C, C.block_size)
    tl.store(p_row[:, None] + o_d[None, :], b_row, mask=m[:, None] & (o_d < C.size)[None, :])


@kernel
def scatter_kernel(
    pages: Pages, source: Source, query: Tokens, requests, lists, heads: tl.int32, C: tl.constexpr
):  # fmt: skip
    """Write a request's slots that moved, its new tokens and query rows.

    Entries are read from the step's source, never from pages, so nothing overwritten is read.
    """
    i_head = tl.program_id(1)
    request = requests + tl.program_id(0) * REQUEST.words
    slots = page_slots(pages, tl.load(request + REQUEST.blocks), i_head, C.size)
    if tl.program_id(2) == 0:
        keep_rows(query, slots, request, i_head, C)
    events, old = tl.load(request + REQUEST.events), tl.load(request + REQUEST.old).to(tl.int32)
    stored = tl.load(request + REQUEST.stored).to(tl.int32)
    live = tl.load(request + REQUEST.live).to(tl.int32)
    width = tl.load(request + REQUEST.width)
    p_list = lists + (tl.load(request + REQUEST.list) + events * width) * heads + i_head * width
    recent = tl.load(request + REQUEST.stop) - live + tl.load(request + REQUEST.shift)
    origin = source_slots(source.data, source, request, i_head, 0)
    o_d = tl.arange(0, C.padded)
    for first in range(tl.program_id(2) * C.block, live, tl.num_programs(2) * C.block):
        i_slot = first + tl.arange(0, C.block)
        m_slot = (i_slot < live) & (i_slot >= tl.where(events > 0, 0, old))
        i_source = tl.load(p_list + i_slot, mask=m_slot & (i_slot < stored), other=0)
        i_source = tl.where(i_slot < stored, i_source, i_slot + recent.to(tl.int32))
        p_from = slot_rows(tl.where(m_slot, i_source, 0), origin, 0)
        m = m_slot[:, None] & (o_d < C.size)[None, :]
        b_k = tl.load(p_from[:, None] + o_d[None, :], mask=m)
        b_v = tl.load(p_from[:, None] + origin.value + o_d[None, :], mask=m)
        p_row = slot_rows(tl.where(m_slot, i_slot, 0), slots, C.block_size)
        tl.store(p_row[:, None] + o_d[None, :], b_k, mask=m)
        tl.store(p_row[:, None] + slots.value + o_d[None, :], b_v, mask=m)


def store_state(
    step: StepPlan, query: Tensor, source: Source, lists: Tensor, kv_cache: Tensor, table: Tensor
) -> None:
    """Write the state after the step, and the next event's query rows, to the pages."""
    heads = kv_cache.shape[1]
    model = Model.of(kv_cache, query.shape[1] // heads)
    launch(
        scatter_kernel, movers(step.extent, heads, step.extent.final),
        (
            Pages.of(kv_cache, table), source, Tokens.of(query), step.tables.requests, lists, heads,
        ),
        constants.rows(model),
    )  # fmt: skip
