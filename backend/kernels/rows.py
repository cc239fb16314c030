"""Device functions shared by the kernels: random bits and where an entry's key and value lie.

An entry of a request is named by its *source index*: [0, old) are the live slots that the request
held before the step, old + t is token t of the step.  A step with new tokens first copies both,
in this order, to a dense page; a step without works on the pages.  So the state after any event is
a list of source indices, and nothing moves while events are worked off.
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
def slot_rows(i_slot, p_slots, p_table, s_page, s_slot, BLOCK_SIZE: tl.constexpr):
    """Pointers [N] to the first element of a request's slots (its key; the value D behind).

    p_slots: this layer's and head's slot 0 of page 0; p_table: the block-table row.  BLOCK_SIZE 0:
    one dense page.
    """
    if BLOCK_SIZE == 0:
        p_row = p_slots + i_slot.to(tl.int64) * s_slot
    else:
        i_page = tl.load(p_table + i_slot // BLOCK_SIZE).to(tl.int64)
        p_row = p_slots + i_page * s_page + (i_slot % BLOCK_SIZE) * s_slot
    return p_row
