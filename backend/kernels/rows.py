"""Device functions shared by the kernels: random bits and where an entry's key and value lie.

An entry of a request is named by its *source index*: [0, old) are the live slots that the request
held before the step, old + t is token t of the step.  A step with new tokens reads them where they
are if its requests held nothing before; else it first copies both, in this order, to dense rows.
A step without new tokens works on the pages.  So the state after any event is a list of source
indices, and nothing moves while events are worked off.
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
def wide(n):
    """n, which is a multiple of 8, as Triton sees it: rows so far apart load in words of 16 bytes.

    (`tl.multiple_of` says nothing of a kernel's own parameter.)
    """
    return (n >> 3) << 3


@triton.jit
def slot_rows(i_slot, p_slots, p_table, s_page, s_slot, BLOCK_SIZE: tl.constexpr):
    """Pointers [N] to the first element of a request's slots: its key.

    p_slots: this layer's and head's slot 0 of page 0; p_table: the block-table row.  BLOCK_SIZE 0:
    consecutive slots.  Strides are multiples of 8 (head sizes are), so that rows load wide.
    """
    s_slot = wide(s_slot)
    if BLOCK_SIZE == 0:
        p_row = p_slots + i_slot.to(tl.int64) * s_slot
    else:
        i_page = tl.load(p_table + i_slot // BLOCK_SIZE).to(tl.int64)
        p_row = p_slots + i_page * wide(s_page) + (i_slot % BLOCK_SIZE) * s_slot
    return p_row


@triton.jit
def request_slots(pages, request, i_head, s_head, s_slot, origin, BLOCK_SIZE: tl.constexpr):
    """Slot 0 of a request: in page 0, or in the row that its column `origin` names (DENSE: of the
    step's dense copy, TOKEN: of the batch)."""
    p_slots = pages + i_head * wide(s_head)
    if BLOCK_SIZE == 0:
        p_slots += tl.load(request + origin) * wide(s_slot)
    return p_slots


@triton.jit
def wait_until(p_count, target):
    """Wait until another program has counted up to `target`; what it wrote before can be read."""
    while acquire(p_count) < target:
        pass
    tl.debug_barrier()


@triton.jit
def acquire(p_count):
    """int32 at p_count, by a load: Triton orders only atomics like this, and they take longer."""
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [p_count.to(tl.int64)], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip
