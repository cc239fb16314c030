"""Host time of a decode step by how many different budgets are live: `python -m bench.host`.

1,000 requests of 32K to 128K tokens decode for some hundred steps; what is timed is what this
project adds to a step's host: decode rows, plans with their tables, and on a GPU the launches that
compact (on a few pages that all requests share, so that the device keeps up).  Processor time of
this thread counts.  All rows have as many compactions a step, since all budgets have one interval:
only the number of different budgets grows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch

CUDA = torch.cuda.is_available()
if not CUDA:  # only plans are made, but the kernels' modules are loaded
    os.environ.setdefault("TRITON_INTERPRET", "1")

from express_vllm.backend.batch import Batch  # noqa: E402
from express_vllm.backend.gpu.decodes import DecodeRows  # noqa: E402
from express_vllm.backend.kernels import plan, scratch  # noqa: E402
from express_vllm.backend.kernels.constants import Model  # noqa: E402
from express_vllm.backend.kernels.memory import Memory, Workspace  # noqa: E402
from express_vllm.backend.kernels.step import compact_pages  # noqa: E402
from express_vllm.layout import Layout, layout_for  # noqa: E402
from express_vllm.shape import Shape, make_shape  # noqa: E402
from express_vllm.softmax import Softmax  # noqa: E402

from . import record  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
REQUESTS, LAYERS, KV_HEADS, GROUP, SIZE, BLOCK = 1000, 32, 1, 4, 64, 16
#: Slots of the budgets: all have an interval of 512 tokens.
LOW, HIGH = 4096, 12288
SHORTEST, LONGEST = 32_768, 131_072


@dataclass(frozen=True)
class Live:
    """What decode rows ask of a request's budget."""

    shape: Shape
    seed: int = 0

    def layout_in(self, wide: bool) -> Layout:
        return layout_for(self.shape)


def budgets(distinct: int) -> list[Live]:
    """One for each request, `distinct` different ones, of the same size on average."""
    sizes = [LOW + (HIGH - LOW) * (2 * i + 1) // (2 * distinct) for i in range(distinct)]
    found = [Live(make_shape(slots)) for slots in sizes]
    return [found[r % distinct] for r in range(REQUESTS)]


class Decoding:
    """Requests that decode together, one token a step."""

    def __init__(self, distinct: int) -> None:
        self.budgets = budgets(distinct)
        self.names = [str(r) for r in range(REQUESTS)]
        self.index = np.arange(REQUESTS)
        self.bounds = np.arange(REQUESTS + 1)  # batch rows
        draws = np.random.default_rng(0).integers(SHORTEST, LONGEST, REQUESTS)
        self.positions = draws
        self.rows = DecodeRows(False, REQUESTS, DEVICE)
        self.workspace = Workspace(scratch.LEAST, DEVICE)
        self.side = scratch.Side(Model(SIZE, GROUP, 2, BLOCK), KV_HEADS, DEVICE)
        self.fits = scratch.decodes_fit(self.side, self.workspace.size)
        self.compactions = 0
        pages = -(-HIGH // BLOCK)
        if CUDA:
            self.cache = torch.zeros(
                LAYERS, pages, KV_HEADS, BLOCK, 2 * SIZE, dtype=torch.bfloat16, device=DEVICE
            )
            table = torch.arange(pages, dtype=torch.int32, device=DEVICE)
            self.table = table.expand(REQUESTS, -1).contiguous()
            self.layers = torch.arange(LAYERS, device=DEVICE)
        for budget, position in zip(self.budgets, self.positions.tolist(), strict=True):
            layout_for(budget.shape).live(position)  # as the prompt's steps did

    def step(self) -> None:
        batch = Batch(self.names, self.budgets, self.bounds, self.positions + 1)
        due = batch.due(self.rows.update(self.index, self.names, self.budgets, batch.starts))
        chunks = [batch.chunk(r) for r in batch.decodes[due].tolist()]
        self.compactions += len(chunks)
        spans = [plan.Span.of(chunk, compacting=True) for chunk in chunks]
        for some in scratch.cut(spans, self.fits):
            made = plan.StepPlan.of(some, DEVICE, 0, Memory(DEVICE, self.workspace))
            if CUDA:
                compact_pages(
                    made, self.cache[0], self.layers * self.cache[0].numel(), self.layers,
                    self.table, 0, Softmax(SIZE**-0.5), GROUP,
                )  # fmt: skip
        self.positions += 1
        self.rows.tables(self.index, self.positions, REQUESTS)


def measure(distinct: int, steps: int, warm: int = 20) -> dict:
    decoding = Decoding(distinct)
    times = []
    for number in range(warm + steps):
        if number == warm:
            decoding.compactions = 0
        if CUDA:
            torch.cuda.synchronize()
        begin = time.thread_time()
        decoding.step()
        if number >= warm:
            times.append(1e3 * (time.thread_time() - begin))
    return {
        "different budgets": distinct, "ms a step": statistics.mean(times),
        "median, ms": statistics.median(times), "longest, ms": max(times),
        "compactions a step": decoding.compactions / steps,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets", default="1,64,256,1000", help="how many different ones")
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest counts")
    parser.add_argument("--name", default="host-gpu" if CUDA else "host-cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [int(n) for n in options.budgets.split(",")]
    # Round by round, so that what else the machine does hits all alike.
    rounds = [[measure(n, options.steps) for n in wanted] for _ in range(options.rounds)]
    rows = [min(found, key=lambda x: x["ms a step"]) for found in zip(*rounds, strict=True)]
    shown = [{k: f"{v:.3g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows]
    print(record.table(shown))
    print(
        record.save(
            f"speed/{options.name}", rows, what="launches included" if CUDA else "planning only"
        )
    )


if __name__ == "__main__":
    main()
