"""Small kernels that move rows between pages, a step's tensors and dense scratch."""

from __future__ import annotations

import triton
import triton.language as tl

from express_vllm.layout import RING_ROWS

from .columns import REQUEST
from .launch import kernel
from .rows import request_slots, slot_rows, wide

ROWS = tl.constexpr(RING_ROWS)


@triton.jit
def query_rows(p_query, m, s_head, o_r, o_d, m_d, GROUP: tl.constexpr, DTYPE: tl.constexpr):
    """Query rows of an event, as stored: rows p_query [ROWS] of a KV head's first query head ->
    [ROWS, d].  The heads of the group take turns."""
    p = p_query + (o_r % GROUP) * wide(s_head)
    b_row = tl.load(p[:, None] + o_d[None, :], mask=m[:, None] & m_d[None, :], other=0.0)
    return b_row.to(DTYPE)


@triton.jit
def keep_rows(
    query, pages, p_table, request, i_head, s_query, s_query_head, s_page, s_head, s_slot,
    D: tl.constexpr, D_PAD: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Store in the ring the step's query rows that the event after the step will need."""
    ring = tl.load(request + REQUEST.ring).to(tl.int32)
    start = tl.load(request + REQUEST.old) - tl.load(request + REQUEST.shift)
    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    m_d = o_d < D
    position = tl.load(request + REQUEST.ring_start) + o_r
    m = (position >= start) & (position < tl.where(ring >= 0, tl.load(request + REQUEST.stop), 0))
    i_token = tl.load(request + REQUEST.token) + position - start
    p_query = query + i_token * wide(s_query)
    b_row = query_rows(
        p_query + i_head * GROUP * wide(s_query_head), m, s_query_head, o_r, o_d, m_d, GROUP,
        pages.dtype.element_ty,
    )  # fmt: skip
    i_slot = tl.where(m, ring + o_r // 2, 0)
    p_row = slot_rows(i_slot, pages + i_head * wide(s_head), p_table, s_page, s_slot, BLOCK_SIZE)
    p_row += (o_r % 2) * D
    tl.store(p_row[:, None] + o_d[None, :], b_row, mask=m[:, None] & m_d[None, :])


@kernel
def gather_kernel(
    pages, table, requests,
    dense,  # out [rows, H, 2 D]: a request's from DENSE on
    s_page: tl.int64, s_head: tl.int64, s_slot: tl.int32, s_table: tl.int32, heads: tl.int32,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Copy a request's live slots out of its pages."""
    i_head = tl.program_id(1)
    request = requests + tl.program_id(0) * REQUEST.words
    old, row = tl.load(request + REQUEST.old).to(tl.int32), tl.load(request + REQUEST.dense)
    p_table = table + tl.load(request + REQUEST.blocks) * s_table
    o_d = tl.arange(0, 2 * D_PAD)
    for first in range(tl.program_id(2) * BLOCK, old, tl.num_programs(2) * BLOCK):
        i_slot = first + tl.arange(0, BLOCK)
        m_slot = i_slot < old
        p_row = slot_rows(
            tl.where(m_slot, i_slot, 0), pages + i_head * wide(s_head), p_table, s_page, s_slot,
            BLOCK_SIZE,
        )  # fmt: skip
        m = m_slot[:, None] & (o_d < 2 * D)[None, :]
        i_row = (row + i_slot) * heads + i_head
        b_row = tl.load(p_row[:, None] + o_d[None, :], mask=m)
        tl.store(dense + i_row[:, None] * (2 * D) + o_d[None, :], b_row, mask=m)


@kernel
def append_kernel(
    key, value, requests,
    dense,  # out [rows, H, 2 D]
    s_key: tl.int32, s_key_head: tl.int32, s_value: tl.int32, s_value_head: tl.int32,
    heads: tl.int32,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy a request's new tokens behind its old slots."""
    i_head = tl.program_id(1)
    request = requests + tl.program_id(0) * REQUEST.words
    old, row = tl.load(request + REQUEST.old), tl.load(request + REQUEST.dense)
    token = tl.load(request + REQUEST.token)
    count = tl.load(request + REQUEST.stop) - (old - tl.load(request + REQUEST.shift))
    o_d = tl.arange(0, D_PAD)
    for first in range(tl.program_id(2) * BLOCK, count.to(tl.int32), tl.num_programs(2) * BLOCK):
        i_token = first + tl.arange(0, BLOCK)
        m = (i_token < count)[:, None] & (o_d < D)[None, :]
        i_row = token + i_token
        p_k = key + i_row * wide(s_key) + i_head * wide(s_key_head)
        p_v = value + i_row * wide(s_value) + i_head * wide(s_value_head)
        b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m)
        b_v = tl.load(p_v[:, None] + o_d[None, :], mask=m)
        i_slot = (row + old + i_token) * heads + i_head
        p_row = dense + i_slot[:, None] * (2 * D) + o_d[None, :]
        tl.store(p_row, b_k.to(dense.dtype.element_ty), mask=m)
        tl.store(p_row + D, b_v.to(dense.dtype.element_ty), mask=m)


@kernel
def scatter_kernel(
    pages, source, table, requests, lists, query,
    s_page: tl.int64, s_head: tl.int64, s_slot: tl.int32, s_table: tl.int32,
    s_source_head: tl.int64, s_source_slot: tl.int32, s_value: tl.int64,
    s_query: tl.int32, s_query_head: tl.int32, heads: tl.int32, origin: tl.int32,
    D: tl.constexpr, D_PAD: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Write a request's state after the step to its pages: slots that moved, new tokens, and the
    query rows that the next event will need.

    Entries are read from the step's source, never from pages, so nothing overwritten is read.
    """
    i_head = tl.program_id(1)
    request = requests + tl.program_id(0) * REQUEST.words
    p_table = table + tl.load(request + REQUEST.blocks) * s_table
    if tl.program_id(2) == 0:
        keep_rows(
            query, pages, p_table, request, i_head, s_query, s_query_head, s_page, s_head, s_slot,
            D, D_PAD, GROUP, BLOCK_SIZE,
        )  # fmt: skip
    events, old = tl.load(request + REQUEST.events), tl.load(request + REQUEST.old).to(tl.int32)
    stored, live = (
        tl.load(request + REQUEST.stored).to(tl.int32),
        tl.load(request + REQUEST.live).to(tl.int32),
    )
    width = tl.load(request + REQUEST.width)
    p_list = lists + (tl.load(request + REQUEST.list) + events * width) * heads + i_head * width
    recent = (tl.load(request + REQUEST.stop) - live + tl.load(request + REQUEST.shift)).to(
        tl.int32
    )
    p_slots = request_slots(source, request, i_head, s_source_head, s_source_slot, origin, 0)
    o_d = tl.arange(0, D_PAD)
    for first in range(tl.program_id(2) * BLOCK, live, tl.num_programs(2) * BLOCK):
        i_slot = first + tl.arange(0, BLOCK)
        m_slot = (i_slot < live) & (i_slot >= tl.where(events > 0, 0, old))
        i_source = tl.load(p_list + i_slot, mask=m_slot & (i_slot < stored), other=0)
        i_source = tl.where(i_slot < stored, i_source, i_slot + recent)
        i_source = tl.where(m_slot, i_source, 0)
        p_from = slot_rows(i_source, p_slots, table, 0, s_source_slot, 0)
        m = m_slot[:, None] & (o_d < D)[None, :]
        b_k = tl.load(p_from[:, None] + o_d[None, :], mask=m)
        b_v = tl.load(p_from[:, None] + wide(s_value) + o_d[None, :], mask=m)
        p_row = slot_rows(
            tl.where(m_slot, i_slot, 0), pages + i_head * wide(s_head), p_table, s_page, s_slot,
            BLOCK_SIZE,
        )  # fmt: skip
        tl.store(p_row[:, None] + o_d[None, :], b_k, mask=m)
        tl.store(p_row[:, None] + D + o_d[None, :], b_v, mask=m)


@kernel
def move_kernel(
    pages, layer_offsets, table, requests, lists,
    spare,  # [programs, slots, COLUMNS]
    s_page: tl.int64, s_head: tl.int64, s_slot: tl.int32, s_table: tl.int32, units: tl.int32,
    request_count: tl.int32, heads: tl.int32, list_entries: tl.int32, slots: tl.int32,
    row: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Rewrite pages in place as an event without new tokens left them, COLUMNS of a row at a time.

    Entries move both ways (chosen heavy hitters down, ejected ones up), so a unit of work reads all
    its moved rows into `spare` before it writes the first one.
    """
    slices = tl.cdiv(row, COLUMNS)
    p_spare = spare + tl.program_id(0).to(tl.int64) * slots * COLUMNS
    o_c = tl.arange(0, COLUMNS)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        o_column = (unit % slices) * COLUMNS + o_c
        m_column = o_column < row
        i_head = (unit // slices) % heads
        request = requests + (unit // slices // heads) % request_count * REQUEST.words
        i_layer = unit // slices // heads // request_count
        stored, live = (
            tl.load(request + REQUEST.stored).to(tl.int32),
            tl.load(request + REQUEST.live).to(tl.int32),
        )
        gap = tl.load(request + REQUEST.old).to(tl.int32) - live
        p_table = table + tl.load(request + REQUEST.blocks) * s_table
        p_slots = tl.multiple_of(pages + tl.load(layer_offsets + i_layer) + i_head * s_head, 16)
        width = tl.load(request + REQUEST.width)
        i_list = i_layer.to(tl.int64) * list_entries + tl.load(request + REQUEST.list)
        i_list += tl.load(request + REQUEST.events) * width
        p_list = lists + i_list * heads + i_head * width
        for first in range(0, live, BLOCK):
            i_slot = first + tl.arange(0, BLOCK)
            m_slot = i_slot < live
            i_source = tl.load(p_list + i_slot, mask=i_slot < stored, other=0)
            i_source = tl.where(i_slot < stored, i_source, i_slot + gap)
            m_slot = m_slot & (i_source != i_slot)
            p_row = slot_rows(
                tl.where(m_slot, i_source, 0), p_slots, p_table, s_page, s_slot, BLOCK_SIZE
            )
            m = m_slot[:, None] & m_column[None, :]
            b_row = tl.load(p_row[:, None] + o_column[None, :], mask=m)
            tl.store(p_spare + i_slot[:, None] * COLUMNS + o_c[None, :], b_row, mask=m)
        tl.debug_barrier()
        for first in range(0, live, BLOCK):
            i_slot = first + tl.arange(0, BLOCK)
            i_source = tl.load(p_list + i_slot, mask=i_slot < stored, other=0)
            i_source = tl.where(i_slot < stored, i_source, i_slot + gap)
            m_slot = (i_slot < live) & (i_source != i_slot)
            p_row = slot_rows(
                tl.where(m_slot, i_slot, 0), p_slots, p_table, s_page, s_slot, BLOCK_SIZE
            )
            m = m_slot[:, None] & m_column[None, :]
            b_row = tl.load(p_spare + i_slot[:, None] * COLUMNS + o_c[None, :], mask=m)
            tl.store(p_row[:, None] + o_column[None, :], b_row, mask=m)
        tl.debug_barrier()


@kernel
def store_token_kernel(
    query, key, value, pages, table, live,
    ring,  # int32 [R]: (2 * slot + half) * ROWS + row of the query row to keep; -1: none
    s_query: tl.int32, s_query_head: tl.int32, s_key: tl.int32, s_key_head: tl.int32,
    s_value: tl.int32, s_value_head: tl.int32,
    s_page: tl.int64, s_head: tl.int64, s_slot: tl.int32, s_table: tl.int32,
    D: tl.constexpr, D_PAD: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Decode: write each request's new key and value to its last live slot, its query row to the
    ring.  Requests with live = 0 are padding."""
    i_request, i_head = tl.program_id(0), tl.program_id(1)
    i_slot = tl.load(live + i_request) - 1
    if i_slot < 0:
        return
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    i_token = i_request.to(tl.int64)
    b_k = tl.load(key + i_token * s_key + i_head * s_key_head + o_d, mask=m_d)
    b_v = tl.load(value + i_token * s_value + i_head * s_value_head + o_d, mask=m_d)
    p_table, p_slots = table + i_token * s_table, pages + i_head * s_head
    p_row = slot_rows(i_slot, p_slots, p_table, s_page, s_slot, BLOCK_SIZE)
    tl.store(p_row + o_d, b_k.to(pages.dtype.element_ty), mask=m_d)
    tl.store(p_row + D + o_d, b_v.to(pages.dtype.element_ty), mask=m_d)
    i_ring = tl.load(ring + i_request)
    if i_ring >= 0:
        turn, i_half = i_ring % ROWS % GROUP, i_ring // ROWS
        p_query = query + i_token * s_query + (i_head * GROUP + turn) * s_query_head
        b_row = tl.load(p_query + o_d, mask=m_d)
        p_row = slot_rows(i_half // 2, p_slots, p_table, s_page, s_slot, BLOCK_SIZE)
        p_row += (i_half % 2) * D
        tl.store(p_row + o_d, b_row.to(pages.dtype.element_ty), mask=m_d)
