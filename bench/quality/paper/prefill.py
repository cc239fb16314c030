"""Prefill with approximate attention: its time by length, and what it does to perplexity.

The paper replaces the attention of a model's last layers and keeps the first and last 32 tokens
exact.  Here each method keeps what it always keeps: Express and StreamingLLM their 4 sinks and
their window, HyperAttention the leaves of its recursion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..harness import LayerCache, Stream, log_probabilities
from ..policies import Policy
from ..progress import Progress
from ..run import Result, Rows, Run
from . import hyper
from .common import last_replaced

FILE = "paper/prefill"
SPLIT = "report"
BATCH = 16
FULL = {"length": 8192, "slots": [1024],
        "lengths": [8192, 32768, 131072, 524288]}  # fmt: skip
SMALL = {"length": 768, "slots": [128], "documents": 2, "lengths": [8192, 32768]}
METHODS = ("express", "hyper", "streaming")


def measure(run: Run) -> Result:
    rows: Rows = []
    if run.model.device.type == "cuda":
        from . import kernels

        rows += kernels.measure(run.options.lengths, run.options.slots[0])
    else:
        print("the time of prefill attention needs a GPU: only perplexity is measured")
    rows += perplexity(run)
    return rows, {"slots": run.options.slots}


def shares(layers: int) -> list[int]:
    """How many of the last layers are replaced: none, a quarter, half, all."""
    return sorted({0, layers // 4, layers // 2, layers})


def method_caches(run: Run, method: str, slots: int, seed: int) -> list[LayerCache]:
    if method == "hyper":
        every = range(run.heads.layers)
        return [*hyper.caches(run.heads, hyper.Hyper.of(slots), seed, every)]
    return Policy.parse(method, slots).caches(run.heads, seed)


def perplexity(run: Run) -> Rows:
    """A row per method, slots, replaced layers, seed and document."""
    options, heads = run.options, run.heads
    cases: list[tuple[str, int, int, int]] = [("exact", 0, 0, 0)]
    for slots in options.slots:
        for method in METHODS:
            seeds = options.seeds[:1] if method == "streaming" else options.seeds
            cases += [(method, slots, k, s) for k in shares(heads.layers)[1:] for s in seeds]
    rows: Rows = []
    groups = list(run.batches(options.length))
    steps = heads.layers * -(-(options.length - 1) // options.chunk)
    with Progress("perplexity", len(cases) * len(groups) * steps) as progress:
        for method, slots, count, seed in cases:
            for names, ids in groups:
                progress.say(f"{method} {slots}, {count} layers")
                found = nll(run, method, slots, count, seed, ids, progress.step)
                rows += [
                    {"what": "perplexity", "method": method, "slots": slots, "layers": count,
                     "seed": seed, "document": name, "nll": round(value, 5)}
                    for name, value in zip(names, found, strict=True)
                ]  # fmt: skip
    return rows


def nll(
    run: Run, method: str, slots: int, count: int, seed: int, ids: torch.Tensor,
    tick: Callable[[], object] | None = None,
) -> Sequence[float]:  # fmt: skip
    """Mean NLL of the tokens from the smallest budget on, nats a token, of each row of ids [B, L]:
    before, no cache has lost anything."""
    first = min(run.options.slots)
    own = method_caches(run, method, slots, seed) if count else []
    stream = Stream(run.model, last_replaced(run.heads, own, count), tick=tick)
    hidden = stream.feed(ids[:, :-1], run.options.chunk)
    found, _ = log_probabilities(run.model, hidden[:, first - 1 :], ids[:, first:])
    return [-float(x) for x in found.double().mean(1)]
