"""Device functions shared by the kernels: random bits, and where keys and values lie.

An entry of a request is named by its *source index*: [0, old) are the live slots that the request
held before the step, old + t is token t of the step.  A step with new tokens reads them where they
are if its requests held nothing before; else it first copies both, in this order, to dense rows.
A step without new tokens works on the pages.  So the state after any event is a list of source
indices, and nothing moves while events are worked off.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from express_vllm.shape import RING_ROWS

from .columns import REQUEST

ROWS = tl.constexpr(RING_ROWS)


@triton.jit
def mix(state, word):
    """`express_vllm.rng.mix` on uint32."""
    h = state ^ word
    h = h ^ (h >> 16)
    h = h * tl.full([], 0x85EBCA6B, tl.uint32)
    h = h ^ (h >> 13)
    h = h * tl.full([], 0xC2B2AE35, tl.uint32)
    h = h ^ (h >> 16)
    return h + tl.full([], 0x9E3779B9, tl.uint32)


@triton.jit
def event_key(seed_low, seed_high, layer, head, position):
    """`express_vllm.rng.key`; all words uint32.  Positions stay below 2^31."""
    state = mix(tl.full([], 0, tl.uint32), seed_low)
    state = mix(state, seed_high)
    state = mix(state, layer)
    state = mix(state, head)
    state = mix(state, position)
    return mix(state, tl.full([], 0, tl.uint32))


@triton.jit
def wide(n):
    """n, which is a multiple of 8, as Triton sees it: rows so far apart load in words of 16 bytes.

    (`tl.multiple_of` says nothing of a kernel's own parameter.)
    """
    return (n >> 3) << 3


class Slots(NamedTuple):
    """Slots of a request, layer and KV head, for `slot_rows`."""

    first: Any  # pointer to slot 0, in page 0
    blocks: Any  # pointer to the block-table row; unused where slots are consecutive
    page: Any  # strides
    slot: Any
    value: Any  # elements from a key to its value


@triton.jit
def page_slots(pages, i_row, i_head, D: tl.constexpr):
    """A request's slots in its pages (`Pages`), by block-table row."""
    return Slots(
        pages.data + i_head * wide(pages.head), pages.table + i_row * pages.blocks, pages.page,
        pages.slot, D,
    )  # fmt: skip


@triton.jit
def source_slots(data, source, request, i_head, BLOCK_SIZE: tl.constexpr):
    """A request's slots in a step's `Source`, whose layer begins at `data`.  Slot 0 is in page 0,
    or in the row that the request's field `origin` names (dense: of the step's copy, token: of the
    batch)."""
    first = data + i_head * wide(source.head)
    if BLOCK_SIZE == 0:
        first += tl.load(request + source.origin) * wide(source.slot)
    p_blocks = source.table + tl.load(request + REQUEST.blocks) * source.blocks
    return Slots(first, p_blocks, source.page, source.slot, wide(source.value))


@triton.jit
def slot_rows(i_slot, slots, BLOCK_SIZE: tl.constexpr):
    """Pointers [N] to the first element of a request's slots: its key.

    BLOCK_SIZE 0: consecutive slots.  Strides are multiples of 8 (head sizes are), so that rows load
    wide.
    """
    s_slot = wide(slots.slot)
    if BLOCK_SIZE == 0:
        p_row = slots.first + i_slot.to(tl.int64) * s_slot
    else:
        i_page = tl.load(slots.blocks + i_slot // BLOCK_SIZE).to(tl.int64)
        p_row = slots.first + i_page * wide(slots.page) + (i_slot % BLOCK_SIZE) * s_slot
    return p_row


@triton.jit
def load_queries(query, i_token, i_head, m, dtype, C: tl.constexpr):
    """Query rows of an event, as stored: tokens [ROWS] of a KV head -> [ROWS, d].  The heads of the
    group take turns."""
    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, C.padded)
    p_query = query.data + i_token * wide(query.token)
    p_query += i_head * C.group * wide(query.head)
    p_query += (o_r % C.group) * wide(query.head)
    m_row = m[:, None] & (o_d < C.size)[None, :]
    return tl.load(p_query[:, None] + o_d[None, :], mask=m_row, other=0.0).to(dtype)


@triton.jit
def ring_rows(slots, ring, m, C: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Pointers [ROWS] to the query rows of a ring whose first slot is `ring`: two in a slot."""
    o_r = tl.arange(0, ROWS)
    p_row = slot_rows(tl.where(m, ring + o_r // 2, 0), slots, BLOCK_SIZE)
    return p_row + (o_r % 2) * C.size
