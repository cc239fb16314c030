"""The dense copy of a chunk's old slots and new tokens, where its own tensors do not serve."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from . import constants, tables
from .arguments import Pages, Source, Tokens
from .columns import REQUEST
from .constants import Model
from .launch import kernel, launch
from .plan import StepPlan
from .rows import page_slots, slot_rows, wide
from .span import Extent, cdiv

#: Most programs of a launch that moves rows: requests of a plan may differ much in size.
_MOVERS = 16384
#: Fields of a request that may name its first row (`Source.origin`).
_ORIGINS = tables.offsets(tables.REQUEST)


@kernel
def gather_kernel(
    pages: Pages, requests,
    dense,  # out [rows, H, 2 D]: a request's from its field `dense` on
    heads: tl.int32,
    C: tl.constexpr,
):  # fmt: skip
    """Copy a request's live slots out of its pages."""
    i_head = tl.program_id(1)
    request = requests + tl.program_id(0) * REQUEST.words
    old, row = tl.load(request + REQUEST.old).to(tl.int32), tl.load(request + REQUEST.dense)
    slots = page_slots(pages, tl.load(request + REQUEST.blocks), i_head, C.size)
    o_d = tl.arange(0, 2 * C.padded)
    for first in range(tl.program_id(2) * C.block, old, tl.num_programs(2) * C.block):
        i_slot = first + tl.arange(0, C.block)
        m_slot = i_slot < old
        p_row = slot_rows(tl.where(m_slot, i_slot, 0), slots, C.block_size)
        m = m_slot[:, None] & (o_d < 2 * C.size)[None, :]
        i_row = (row + i_slot) * heads + i_head
        b_row = tl.load(p_row[:, None] + o_d[None, :], mask=m)
        tl.store(dense + i_row[:, None] * (2 * C.size) + o_d[None, :], b_row, mask=m)


@kernel
def append_kernel(
    key: Tokens, value: Tokens, requests,
    dense,  # out [rows, H, 2 D]
    heads: tl.int32,
    C: tl.constexpr,
):  # fmt: skip
    """Copy a request's new tokens behind its old slots."""
    i_head = tl.program_id(1)
    request = requests + tl.program_id(0) * REQUEST.words
    old, row = tl.load(request + REQUEST.old), tl.load(request + REQUEST.dense)
    token = tl.load(request + REQUEST.token)
    count = tl.load(request + REQUEST.stop) - (old - tl.load(request + REQUEST.shift))
    count = count.to(tl.int32)
    o_d = tl.arange(0, C.padded)
    for first in range(tl.program_id(2) * C.block, count, tl.num_programs(2) * C.block):
        i_token = first + tl.arange(0, C.block)
        m = (i_token < count)[:, None] & (o_d < C.size)[None, :]
        i_row = token + i_token
        p_k = key.data + i_row * wide(key.token) + i_head * wide(key.head)
        p_v = value.data + i_row * wide(value.token) + i_head * wide(value.head)
        b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m)
        b_v = tl.load(p_v[:, None] + o_d[None, :], mask=m)
        i_slot = (row + old + i_token) * heads + i_head
        p_row = dense + i_slot[:, None] * (2 * C.size) + o_d[None, :]
        tl.store(p_row, b_k.to(dense.dtype.element_ty), mask=m)
        tl.store(p_row + C.size, b_v.to(dense.dtype.element_ty), mask=m)


def chunk_source(
    step: StepPlan, key: Tensor, value: Tensor, kv_cache: Tensor, table: Tensor
) -> Source:
    """Old slots, copied out of the pages since the step overwrites those, then the new tokens.

    Dense rows keep addresses simple; the copy is a hundredth of a chunk's attention.  Where no
    request holds old slots, the step's own tensors serve.
    """
    heads, _, width = kv_cache.shape[1:]
    extent, zero, model = step.extent, step.zero, Model.of(kv_cache, 1)

    def source(data: Tensor, value_offset: int, head: int, slot: int, origin: str) -> Source:
        return Source(
            data, zero, table, value_offset, 0, head, slot, table.stride(0), _ORIGINS[origin]
        )

    if not extent.old and key.stride() == value.stride() and key.dtype == kv_cache.dtype:
        value_offset = (value.data_ptr() - key.data_ptr()) // key.element_size()
        if not any(n % 8 for n in (value_offset, *key.stride()[:2])):
            return source(key, value_offset, key.stride(1), key.stride(0), "token")
    dense = step.kept(
        "dense", lambda: step.memory.empty(extent.dense, heads, width, dtype=kv_cache.dtype)
    )
    requests = step.tables.requests
    if extent.old:
        launch(
            gather_kernel, movers(extent, heads, extent.old),
            (Pages.of(kv_cache, table), requests, dense, heads), constants.rows(model),
        )  # fmt: skip
    launch(
        append_kernel, movers(extent, heads, extent.tokens),
        (Tokens.of(key), Tokens.of(value), requests, dense, heads), constants.rows(model),
    )  # fmt: skip
    return source(dense, width // 2, dense.stride(1), dense.stride(0), "dense")


def movers(extent: Extent, heads: int, rows: int) -> tuple[int, int, int]:
    """Grid of a kernel that moves up to `rows` rows of each request and head.  A program strides
    over its request's, so that the longest one does not set the number of idle programs."""
    most = max(1, _MOVERS // (extent.requests * heads))
    return extent.requests, heads, max(1, min(cdiv(rows, constants.MOVED), most))
