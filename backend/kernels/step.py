"""What a step asks of the kernels: `run_chunks` is one layer's work for prompt chunks,
`compact_pages` the compaction of decode steps for all layers at once.

Both run a `StepPlan` (`plan.py`), which serves requests of any budgets of one kind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from express_vllm.softmax import Softmax

from ..chunk import Chunk
from .arguments import Pages, Source
from .constants import Model
from .dense import chunk_source
from .move import move_pages
from .plan import StepPlan
from .prefill import attend_chunks
from .scores import score_recent
from .scratch import Compaction, Side, Tuning
from .span import Extent, Span
from .state import store_state
from .work import compact

__all__ = [
    "Chunk", "Extent", "Model", "Source", "Span", "StepPlan", "Tuning", "attend_chunks",
    "chunk_source", "compact", "compact_pages", "identity_lists", "run_chunks", "score_recent",
    "store_state",
]  # fmt: skip

#: Times a layer's compaction: a context, given the stream on which it ends.
Timer = Callable[[torch.cuda.Stream | None], contextlib.AbstractContextManager[None]]


def run_chunks(
    step: StepPlan, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, table: Tensor,
    layer: int, first_head: int, softmax: Softmax, output: Tensor, tuning: Tuning | None = None,
    side: torch.cuda.Stream | None = None, timed: Timer | None = None,
) -> None:  # fmt: skip
    """One layer's prompt chunks: events, attention, and the state after the step in the pages.

    query, output [T, heads, d]; key, value [T, KV heads, d]; kv_cache [blocks, KV heads, block
    size, 2 d]; table int32 [R, blocks].  With a stream `side` (of high priority) attention runs
    while events are worked off there: they are sequential and keep few multiprocessors busy.  A
    query tile waits for the list that it needs.  `timed`: a context around the events, given the
    stream on which they end.
    """
    source = chunk_source(step, key, value, kv_cache, table)
    heads, group = key.shape[1], query.shape[1] // key.shape[1]
    model, running = Model.of(kv_cache, group), None
    if step.kind:
        with timed(side) if timed else contextlib.nullcontext():
            scores = score_recent(step, query, kv_cache, source, 1, softmax, group)
            lists, running = compact(
                step, scores, source, heads, model, source.layer_offsets, first_head, softmax,
                layer, tuning, side,
            )  # fmt: skip
    else:
        lists = identity_lists(step)
    attend_chunks(step, query, source, lists, heads, softmax, output, running if side else None)
    if side and step.kind:
        torch.cuda.current_stream().wait_stream(side)
    store_state(step, query, source, lists, kv_cache, table)


def identity_lists(step: StepPlan) -> Tensor:
    """The one list of a step without events: every stored slot is where it was."""
    device = step.zero.device
    return step.kept(
        "identity",
        lambda: torch.arange(step.extent.width, dtype=torch.int32, device=device),
    )


def compact_pages(
    step: StepPlan, kv_cache: Tensor, layer_offsets: Tensor, layer_ids: Tensor, table: Tensor,
    first_head: int, softmax: Softmax, group: int, tuning: Tuning | None = None,
) -> None:  # fmt: skip
    """Run the events of a `compacting` step for all layers and rewrite the pages in place.

    kv_cache: the first layer's pages; layer_offsets int64 [L]: element offsets of every layer's
    pages from it; layer_ids int64 [L]: global layer indices; sinks of several layers need their
    offsets (`Softmax`).  As many layers at a time as scratch has room for.
    """
    heads, model = kv_cache.shape[1], Model.of(kv_cache, group)
    side = Side(model, heads, kv_cache.device)
    workspace = step.memory.workspace
    share = Compaction.of(step.extent, side, workspace.size if workspace else None)
    for first in range(0, len(layer_offsets), share.layers):
        offsets, ids = (x[first : first + share.layers] for x in (layer_offsets, layer_ids))
        if ("scores", len(ids)) not in step.cached:
            step.memory.restart()
        source = page_source(kv_cache, offsets, table)
        some = softmax.of_layers(first, len(ids))
        scores = score_recent(step, None, kv_cache, source, len(ids), some, group)
        lists, _ = compact(
            step, scores, source, heads, model, ids, first_head, some, tuning=tuning,
            limit=share.sharing_limit,
        )  # fmt: skip
        move_pages(step, kv_cache, offsets, table, lists, model, share.spare)


def page_source(kv_cache: Tensor, layer_offsets: Tensor, table: Tensor) -> Source:
    pages = Pages.of(kv_cache, table)
    return Source(
        kv_cache, layer_offsets, table, kv_cache.shape[3] // 2, pages.page, pages.head, pages.slot,
        pages.blocks, 0,
    )  # fmt: skip
