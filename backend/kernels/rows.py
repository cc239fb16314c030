"""Device functions shared by the kernels: random bits and where an entry's key and value lie.

An entry of a request is named by its *source index*: [0, old) are the live slots that the request
held before the step, old + t is token t of the step.  So the state after any event is a list of
source indices, and nothing is copied while events are worked off.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def source_rows(
    i_source,  # int32 [N], source indices
    old,  # source indices below it are slots of the pages
    p_slots,  # this layer's and head's pages: element 0 of slot 0 of page 0
    p_table,  # this request's block-table row
    s_page,
    s_slot,
    p_key,  # the step's first token of this request, this head
    p_value,
    s_key,
    s_value,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,  # slots of a page; 0: slots lie in one dense page
    HAS_OLD: tl.constexpr,
    HAS_NEW: tl.constexpr,
):
    """Pointers [N] to the first element of each entry's key and value."""
    if HAS_NEW:
        i_token = (i_source - old).to(tl.int64)
        p_k = p_key + i_token * s_key
        p_v = p_value + i_token * s_value
        if HAS_OLD:
            m_old = i_source < old
            i_slot = tl.where(m_old, i_source, 0)
            p_old = slot_rows(i_slot, p_slots, p_table, s_page, s_slot, BLOCK_SIZE)
            p_k = tl.where(m_old, p_old, p_k)
            p_v = tl.where(m_old, p_old + D, p_v)
    else:
        p_k = slot_rows(i_source, p_slots, p_table, s_page, s_slot, BLOCK_SIZE)
        p_v = p_k + D
    return p_k, p_v


@triton.jit
def slot_rows(i_slot, p_slots, p_table, s_page, s_slot, BLOCK_SIZE: tl.constexpr):
    """Pointers [N] to the first element of slots `i_slot` of a request (its key; value D behind)."""
    if BLOCK_SIZE == 0:
        p_row = p_slots + i_slot.to(tl.int64) * s_slot
    else:
        i_page = tl.load(p_table + i_slot // BLOCK_SIZE).to(tl.int64)
        p_row = p_slots + i_page * s_page + (i_slot % BLOCK_SIZE) * s_slot
    return p_row
