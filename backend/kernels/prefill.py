"""Causal attention of a step's tokens over the weighted state valid at each one's position.

A query tile lies between two events.  It attends to the stored slots of the state after the last
event (gathered through that state's list of source indices, with their log-weights) and to the
exact tokens since, which are consecutive.  The query heads of a KV head share a tile's rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from express_vllm.softmax import Softmax

from . import constants
from .arguments import LOG2E, Logits, Source, Tables, Tokens, Work
from .columns import REQUEST, TILE
from .constants import Model
from .launch import Launch, kernel, launch
from .logits import sink_logits, to_logits
from .plan import StepPlan
from .rows import slot_rows, source_slots, wide
from .team import wait_until


@triton.jit
def attend_tile(
    b_q, b_acc, b_most, b_sum, i_slot, slots, b_bias, m_seen, logits, C: tl.constexpr,
    WEIGHTED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax, base 2, over slots i_slot [N]."""
    o_d = tl.arange(0, C.padded)
    m_d = (o_d < C.size)[None, :]
    p_k = slot_rows(i_slot, slots, 0)
    # The tensor cores' parts of wider fp32 rows do not fit in shared memory.
    PRECISION: tl.constexpr = "tf32x3" if C.padded <= 128 else "ieee"
    if C.size == C.padded:
        b_k = tl.load(p_k[:, None] + o_d[None, :])
    else:
        b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m_d, other=0.0)
    b_score = to_logits(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), logits, C)
    if WEIGHTED:
        b_score += b_bias[None, :]
    if MASKED:
        b_score = tl.where(m_seen, b_score, -1.0e30)
    b_new = tl.maximum(b_most, tl.max(b_score, 1))
    b_share = tl.exp2(b_score - b_new[:, None])
    b_fade = tl.exp2(b_most - b_new)
    b_sum = b_sum * b_fade + tl.sum(b_share, 1)
    if C.size == C.padded:
        b_v = tl.load(p_k[:, None] + slots.value + o_d[None, :])
    else:
        b_v = tl.load(p_k[:, None] + slots.value + o_d[None, :], mask=m_d, other=0.0)
    b_acc = b_acc * b_fade[:, None]
    b_acc = tl.dot(b_share.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    return b_acc, b_new, b_sum


@kernel
def prefill_kernel(
    query: Tokens, output: Tokens, source: Source, tables: Tables,
    lists,
    progress,  # int32 [R, H]: lists that are written
    logits: Logits, heads: tl.int32,
    wait: tl.int32,  # whether lists are written while this runs
    C: tl.constexpr,
):  # fmt: skip
    # Heads first: programs start in the order in which the lists are written.
    i_head, tile = tl.program_id(0), tables.tiles + tl.program_id(1) * TILE.words
    row, count = tl.load(tile + TILE.row), tl.load(tile + TILE.tokens)
    stored, p_bias = tl.load(tile + TILE.stored), tables.bias + tl.load(tile + TILE.bias)
    recent, last = tl.load(tile + TILE.recent), tl.load(tile + TILE.last)
    i_request = tl.load(tile + TILE.request)
    request = tables.requests + i_request * REQUEST.words
    slots = source_slots(source.data, source, request, i_head, 0)
    p_list = lists + tl.load(tile + TILE.list).to(tl.int64) * heads
    p_list += i_head * tl.load(request + REQUEST.width)
    needed = tl.load(tile + TILE.needed)
    if needed * wait > 0:
        wait_until(progress + i_request * heads + i_head, needed)

    o_m, o_d = tl.arange(0, C.rows), tl.arange(0, C.padded)
    m = (o_m // C.group < count)[:, None] & (o_d < C.size)[None, :]
    o_row = (row + o_m // C.group).to(tl.int64)
    i_query_head = i_head * C.group + o_m % C.group
    p_query = query.data + o_row * wide(query.token)
    p_query += i_query_head * wide(query.head)
    b_q = tl.load(p_query[:, None] + o_d[None, :], mask=m, other=0.0)
    b_acc, b_most, b_sum = attend_stored(
        b_q, i_query_head, slots, p_list, p_bias, stored, logits, C
    )  # fmt: skip
    b_acc, b_sum = attend_recent(
        b_q, b_acc, b_most, b_sum, slots, recent, last, count, logits, C
    )  # fmt: skip
    p_output = output.data + o_row * wide(output.token)
    p_output += i_query_head * wide(output.head)
    b_acc = (b_acc / b_sum[:, None]).to(output.data.dtype.element_ty)
    tl.store(p_output[:, None] + o_d[None, :], b_acc, mask=m)


@triton.jit
def attend_stored(
    b_q, i_query_head, slots, p_list, p_bias, stored, logits, C: tl.constexpr
):  # fmt: skip
    """The running softmax over the sinks and the stored slots -> numerators, maxima and sums of a
    tile's rows."""
    o_n = tl.arange(0, C.block)
    b_acc = tl.zeros([C.rows, C.padded], tl.float32)
    b_most = tl.full([C.rows], -1.0e30, tl.float32)
    b_sum = tl.zeros([C.rows], tl.float32)
    if C.sinks:
        b_most, b_sum = sink_logits(logits, 0, i_query_head) * 1.4426950408889634, b_sum + 1.0
    for first in range(0, stored, C.block):
        i_slot = first + o_n
        m_slot = i_slot < stored
        i_source = tl.load(p_list + i_slot, mask=m_slot, other=0)
        b_bias = tl.load(p_bias + i_slot, mask=m_slot, other=-1.0e30)
        b_acc, b_most, b_sum = attend_tile(
            b_q, b_acc, b_most, b_sum, i_source, slots, b_bias, m_slot[None, :], logits, C,
            True, False,
        )  # fmt: skip
    return b_acc, b_most, b_sum


@triton.jit
def attend_recent(
    b_q, b_acc, b_most, b_sum, slots, recent, last, count, logits, C: tl.constexpr
):  # fmt: skip
    """Over the exact tokens from source index `recent` on: those that every row of the query tile
    sees, then the diagonal, in which `last` is the first query's own."""
    o_n, i_token = tl.arange(0, C.block), tl.arange(0, C.rows) // C.group
    whole = recent + (last + 1 - recent) // C.block * C.block
    for first in range(recent, whole, C.block):
        b_acc, b_most, b_sum = attend_tile(
            b_q, b_acc, b_most, b_sum, first + o_n, slots, b_sum, b_sum, logits, C, False, False
        )  # fmt: skip
    for first in range(whole, last + count, C.block):
        i_source = first + o_n
        m_seen = i_source[None, :] <= last + i_token[:, None]
        b_acc, b_most, b_sum = attend_tile(
            b_q, b_acc, b_most, b_sum, tl.minimum(i_source, last + count - 1), slots, b_sum,
            m_seen, logits, C, False, True,
        )  # fmt: skip
    return b_acc, b_sum


@kernel
def wait_started_kernel(counters, programs: tl.int32):
    """Return once the compaction's programs run: attention, which waits for their lists, must not
    take the multiprocessors that they need."""
    wait_until(counters, programs)


def attend_chunks(
    step: StepPlan, query: Tensor, source: Source, lists: Tensor, heads: int, softmax: Softmax,
    output: Tensor, running: Work | None = None, variant: Launch | None = None,
) -> None:  # fmt: skip
    """Every token's attention over the state valid at its position, one launch; `heads`: KV heads.

    `running`: a compaction that may not have ended; a query tile then waits for its list.
    """
    if not step.tiles:
        return
    if variant is None:
        model = Model(query.shape[2], query.shape[1] // heads, query.element_size(), 0)
        variant = constants.prefill(model.attending(softmax))
    if running:
        launch(wait_started_kernel, (1,), (running.counters, len(running.scratch)), Launch(warps=1))
    progress = running.progress if running else lists
    launch(
        prefill_kernel, (heads, step.tiles),
        (
            Tokens.of(query), Tokens.of(output), source, step.tables, lists, progress,
            Logits.of(softmax, step.zero, LOG2E), heads, int(running is not None),
        ),
        variant,
    )  # fmt: skip
