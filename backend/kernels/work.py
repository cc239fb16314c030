"""A step's compaction as the host launches it: scratch for its programs, and its lists."""

from __future__ import annotations

import torch
from torch import Tensor

from express_vllm.softmax import Softmax

from . import constants
from .arguments import Heads, Logits, Scores, Source, Work
from .compaction import compact_kernel
from .constants import Model
from .launch import launch
from .plan import StepPlan
from .scratch import USUAL, Sharing, Side, Tuning, sharing


def make_work(step: StepPlan, heads: int, layers: int, found: Sharing) -> Work:
    """In the step's memory."""
    empty, i32, f32 = step.memory.empty, torch.int32, torch.float32
    counters = empty(found.counters, dtype=i32)
    lists = empty(layers, heads * step.extent.lists, dtype=i32)
    virtual = empty(found.programs, 2 * found.virtual, dtype=i32)
    return Work(
        lists=lists,
        scratch=empty(found.programs, found.scratch, dtype=f32),
        virtual=virtual,
        shared=empty(found.teams, found.shared, dtype=f32),
        counters=counters,
        progress=counters[found.counters - step.extent.requests * heads :],
        entries=step.extent.lists,
        scratch_width=found.scratch,
        virtual_width=found.virtual,
        output_width=found.outputs,
        shared_width=found.shared,
        team=found.team,
    )


def compact(
    step: StepPlan, scores: Scores, source: Source, heads: int, model: Model, layer_ids: Tensor,
    first_head: int, softmax: Softmax, first_layer: int = 0, tuning: Tuning | None = None,
    stream: torch.cuda.Stream | None = None, limit: int | None = None,
) -> tuple[Tensor, Work]:  # fmt: skip
    """Run a step's events -> lists of kept source indices, int32 [L, KV heads * entries].

    layer_ids int64 [L] plus `first_layer` feed the random bits, as does the global index of the
    first KV head.  `stream`: where to run, if not where memory is taken from; `limit`: bytes of the
    programs' scratch.  The lists lie in the step's memory: the next call overwrites them.
    """
    tuning = tuning or USUAL
    layers, requests = len(layer_ids), step.extent.requests
    assert step.kind, "a step without events has nothing to compact"
    kind = step.kind

    def make() -> Work:
        side = Side(model, heads, scores.rows.device)
        found = sharing(step.extent, kind, side, layers, source.paged, tuning, limit)
        return make_work(step, heads, layers, found)

    work = step.kept(("work", layers, tuning), make)
    work.counters.zero_()
    model = model.attending(softmax)
    variant = constants.compaction(kind, model, source.paged)._replace(warps=tuning.warps)
    logits = Logits.of(softmax, step.zero)
    if stream:
        stream.wait_stream(torch.cuda.current_stream())
    tasks = Heads(layer_ids, first_layer, first_head, heads, requests, layers * requests * heads)
    launch(
        compact_kernel, (len(work.scratch),),
        (step.tables, scores, source, work, tasks, logits, model.size**-0.5), variant, stream,
    )  # fmt: skip
    return work.lists, work
