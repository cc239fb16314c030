"""The pages of decodes, rewritten in place as an event without new tokens left them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import constants
from .arguments import Pages
from .columns import REQUEST
from .constants import Model
from .launch import kernel, launch
from .plan import StepPlan
from .rows import Slots, slot_rows
from .scratch import Side, spare_bytes
from .span import cdiv


@triton.jit
def moved(i_slot, p_list, stored, live, gap):
    """Source indices of a request's slots, and which slots another one's row moves to."""
    i_source = tl.load(p_list + i_slot, mask=i_slot < stored, other=0)
    i_source = tl.where(i_slot < stored, i_source, i_slot + gap)
    return i_source, (i_slot < live) & (i_source != i_slot)


@kernel
def move_kernel(
    pages: Pages,  # of the first layer
    layer_offsets, requests, lists,
    spare,  # [programs, slots, columns]
    units: tl.int32, request_count: tl.int32, heads: tl.int32, list_entries: tl.int32,
    slots: tl.int32,
    C: tl.constexpr,
):  # fmt: skip
    """Move rows, some columns of them at a time.

    Entries move both ways (chosen heavy hitters down, ejected ones up), so a unit of work reads all
    its moved rows into `spare` before it writes the first one.
    """
    slices = tl.cdiv(C.row, C.columns)
    p_spare = spare + tl.program_id(0).to(tl.int64) * slots * C.columns
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        i_head = (unit // slices) % heads
        request = requests + (unit // slices // heads) % request_count * REQUEST.words
        i_layer = unit // slices // heads // request_count
        p_blocks = pages.table + tl.load(request + REQUEST.blocks) * pages.blocks
        p_slots = pages.data + tl.load(layer_offsets + i_layer) + i_head * pages.head
        rows = Slots(tl.multiple_of(p_slots, 16), p_blocks, pages.page, pages.slot, 0)
        width = tl.load(request + REQUEST.width)
        i_list = i_layer.to(tl.int64) * list_entries + tl.load(request + REQUEST.list)
        i_list += tl.load(request + REQUEST.events) * width
        p_list = lists + i_list * heads + i_head * width
        move_rows(request, rows, p_list, p_spare, (unit % slices) * C.columns, C)


@triton.jit
def move_rows(request, rows, p_list, p_spare, column, C: tl.constexpr):
    """A request's rows of a layer and KV head, columns from `column` on."""
    o_c = tl.arange(0, C.columns)
    o_column = column + o_c
    m_column = o_column < C.row
    stored = tl.load(request + REQUEST.stored).to(tl.int32)
    live = tl.load(request + REQUEST.live).to(tl.int32)
    gap = tl.load(request + REQUEST.old).to(tl.int32) - live
    for first in range(0, live, C.block):
        i_slot = first + tl.arange(0, C.block)
        i_source, m_slot = moved(i_slot, p_list, stored, live, gap)
        p_row = slot_rows(tl.where(m_slot, i_source, 0), rows, C.block_size)
        m = m_slot[:, None] & m_column[None, :]
        b_row = tl.load(p_row[:, None] + o_column[None, :], mask=m)
        tl.store(p_spare + i_slot[:, None] * C.columns + o_c[None, :], b_row, mask=m)
    tl.debug_barrier()
    for first in range(0, live, C.block):
        i_slot = first + tl.arange(0, C.block)
        i_source, m_slot = moved(i_slot, p_list, stored, live, gap)
        p_row = slot_rows(tl.where(m_slot, i_slot, 0), rows, C.block_size)
        m = m_slot[:, None] & m_column[None, :]
        b_row = tl.load(p_spare + i_slot[:, None] * C.columns + o_c[None, :], mask=m)
        tl.store(p_row[:, None] + o_column[None, :], b_row, mask=m)
    tl.debug_barrier()


def move_pages(
    step: StepPlan, kv_cache: Tensor, offsets: Tensor, table: Tensor, lists: Tensor, model: Model,
    spare_limit: int,
) -> None:  # fmt: skip
    """Rewrite the pages of some layers as the lists say; spare_limit: bytes of the rows in motion.

    kv_cache: the first layer's pages; offsets int64 [L]: element offsets of every layer's from it.
    """
    extent, heads = step.extent, kv_cache.shape[1]
    slices = cdiv(2 * model.size, constants.MOVE_COLUMNS)
    units = len(offsets) * extent.requests * heads * slices
    side = Side(model, heads, kv_cache.device)
    programs = min(units, 1056, max(1, spare_limit // spare_bytes(extent, side)))
    spare = step.kept(
        ("spare", len(offsets)),
        lambda: step.memory.empty(
            programs, extent.final, constants.MOVE_COLUMNS, dtype=kv_cache.dtype
        ),
    )
    launch(
        move_kernel, (programs,),
        (
            Pages.of(kv_cache, table), offsets, step.tables.requests, lists, spare, units,
            extent.requests, heads, extent.lists, extent.final,
        ),
        constants.move(model),
    )  # fmt: skip
