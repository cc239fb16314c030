"""How tight the published bounds are: entries held against 6 n_out, error against log^1.5(n) / s.

Express Language Modeling (arXiv 2606.10944) bounds the error of an output's coordinates by
O(log^1.5(n) / s) and the coreset by 6 n_out entries.  The inputs are random, of rank 2 with values
that are a smooth function of the keys, where balancing has something to balance, or of full rank,
where any two keys are far apart.  The caches have no heavy hitters and the smallest window, so that
the error is that of the coreset.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from express_vllm.layout import layout_for
from express_vllm.shape import make_shape

from .. import record
from .caches import ExactCache
from .harness import Heads
from .policies import Policy
from .progress import Progress

SIZES = "sinks=0,window=32,interval=32"
#: Cache -> policy.  `even` keeps old tokens as dense as these inputs need them.
CACHES = {
    "published Express": f"express:schedule=paper,{SIZES}",
    "its schedule, coins": f"uniform:schedule=paper,{SIZES}",
    "lazy, greedy signs": f"express:heavy=0,profile=even,{SIZES}",
    "lazy, coins": f"uniform:profile=even,{SIZES}",
}
SLOTS = (256, 512, 1024, 2048)
LENGTHS = (4096, 16384)
#: Independent heads of a run, and the last positions whose outputs are compared.
HEADS, POSITIONS, SIZE = 8, 64, 64
#: Rank of queries and keys -> their scale, for scores of deviation 0.5 and 1.
RANKS = {2: 0.3, SIZE: 1.0}
#: Tokens over which the peak of the published coreset is looked for.
FAR = 1 << 20


def measure(
    slots: Sequence[int] = SLOTS, lengths: Sequence[int] = LENGTHS,
    ranks: Sequence[int] = tuple(RANKS), seed: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row per rank, cache, slots and length: the largest error of an output's coordinate, as a
    part of the largest value's, of every head."""
    heads = Heads(1, HEADS, HEADS, SIZE, SIZE**-0.5, None, None)
    rows = [{"what": "peak", "slots": n, **peak(n)} for n in slots]
    runs = list(product(ranks, lengths))
    with Progress("bound", len(runs) * len(slots) * len(CACHES)) as progress:
        for rank, length in runs:
            inputs = random_inputs(rank, length, seed)
            exact = ExactCache(heads).attend(*inputs)[:, :, -POSITIONS:]
            for n, (name, text) in product(slots, CACHES.items()):
                progress.say(f"rank {rank}, {name} {n} {length}")
                (cache,) = Policy.parse(text, n).caches(heads, seed)
                ours = cache.attend(*inputs)[:, :, -POSITIONS:]
                worst = (ours - exact).abs().amax((0, 2, 3)) / inputs[2].abs().amax((0, 2, 3))
                rows.append({
                    "what": "error", "rank": rank, "policy": name, "slots": n, "length": length,
                    "errors": [round(float(x), 6) for x in worst],
                })  # fmt: skip
                progress.step()
    return rows


def store() -> Path:
    started = time.monotonic()
    rows = measure()
    return record.save(
        "quality/bounds", rows, experiment="bound", model="no model", dtype="float32",
        device="cpu", length=max(LENGTHS), documents=[],
        versions=record.versions("express-vllm", "torch", "numba"),
        seconds=round(time.monotonic() - started), stopped=[],
    )  # fmt: skip


def random_inputs(rank: int, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [1, HEADS, length, SIZE]."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if rank == SIZE:
        query, key, value = random(3, 1, HEADS, length, SIZE)
        return query, key, value
    basis, slope = random(2, HEADS, rank, SIZE) / math.sqrt(rank)
    hidden_query, hidden = random(2, 1, HEADS, length, rank) * RANKS[rank]
    return hidden_query @ basis, hidden @ basis, torch.tanh(hidden @ slope / RANKS[rank])


def peak(slots: int) -> dict[str, Any]:
    """n_out of the published schedule and the most entries that its coreset holds."""
    shape = make_shape(slots, schedule="paper", sinks=0, window=32, interval=32)
    layout = layout_for(shape)
    most = max(e.live_before for e in layout.events(0, FAR)) - shape.window - shape.interval
    return {"n_out": shape.target, "most": most}


def constant(error: float, slots: int, length: int) -> float:
    """C of error = C log^1.5(n) / s."""
    return error * slots / math.log(length) ** 1.5
