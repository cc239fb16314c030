"""Relative error of attention outputs, layer by layer.

`exact` inputs: every layer gets the queries, keys and values of the exact model, so a layer's error
is its own.  `streaming` inputs: the model runs with the cache, so that what earlier layers lost is
in the queries, keys and values too; its outputs are compared with the exact model's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .caches import ExactCache
from .harness import Heads, LayerCache, Stream
from .policies import Policy, every
from .progress import Progress
from .run import Result, Rows, Run

FILE = "quality/attention-error"
SPLIT = "report"
BATCH = 1
FULL = {"slots": [1024, 2048], "length": 8192, "first": 3072, "documents": 3,
        "policies": ["express", "paper", "uniform", "streaming", "snapkv", "h2o"]}  # fmt: skip
SMALL = {"slots": [512], "length": 3072, "first": 1536, "documents": 1,
         "policies": ["express", "paper", "streaming", "snapkv"]}  # fmt: skip

#: Of the compared positions one in so many is stored: what the exact outputs take in memory.
STRIDE = 4


def measure(run: Run) -> Result:
    """A row per policy, slots and document: errors of all layers, both ways."""
    options, model, heads = run.options, run.model, run.heads
    first, chunk = options.first, options.chunk
    policies = [p for p in every(options.policies, options.slots) if p.name != "exact"]
    a_document = -(-options.length // chunk) * heads.layers * (1 + 2 * len(policies))
    rows: Rows = []
    with Progress("error", a_document * len(run.documents)) as progress:
        for name, ids in run.documents.items():
            tensor = torch.tensor([ids[: options.length]], device=model.device)
            truth = _Truth(heads, policies, first, progress)
            caches = [ExactCache(heads) for _ in range(heads.layers)]
            Stream(model, caches, truth.watch, progress.step).feed(tensor, chunk)
            for i, policy in enumerate(policies):
                progress.say(f"{policy.label} {policy.slots} {name}")
                streaming = _Compare(truth.outputs, first, heads.layers)
                Stream(model, policy.caches(heads), streaming.watch, progress.step).feed(
                    tensor, chunk
                )
                rows.append({
                    "policy": policy.label, "slots": policy.slots, "document": name,
                    "exact": truth.errors[i].means(), "streaming": streaming.means(),
                })  # fmt: skip
    return rows, {}


class _Mean:
    """Mean relative error of each layer."""

    def __init__(self, layers: int) -> None:
        self.total = [0.0] * layers
        self.count = [0] * layers

    def add(self, layer: int, output: Tensor, truth: Tensor) -> None:
        error = (output - truth).float().norm(dim=-1) / truth.float().norm(dim=-1)
        self.total[layer] += float(error.sum())
        self.count[layer] += error.numel()

    def means(self) -> list[float]:
        return [round(t / c, 5) for t, c in zip(self.total, self.count, strict=True)]


def _picked(output: Tensor, start: int, first: int) -> Tensor:
    """Every STRIDE-th position from `first` on, of outputs whose first position is `start`."""
    skip = max(first - start, (first - start) % STRIDE)
    return output[:, :, skip::STRIDE]


class _Truth:
    """The exact run: keeps its outputs and lets every policy's caches run beside it."""

    def __init__(
        self, heads: Heads, policies: Sequence[Policy], first: int, progress: Progress
    ) -> None:
        self.first, self.progress = first, progress
        self.outputs: list[list[Tensor]] = [[] for _ in range(heads.layers)]
        self.tokens = [0] * heads.layers
        self.caches: list[list[LayerCache]] = [policy.caches(heads) for policy in policies]
        self.errors = [_Mean(heads.layers) for _ in policies]

    def watch(self, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        start = self.tokens[layer]
        self.tokens[layer] += query.shape[2]
        truth = _picked(output, start, self.first)
        self.outputs[layer].append(truth)
        for caches, error in zip(self.caches, self.errors, strict=True):
            ours = caches[layer].attend(query, key, value)
            error.add(layer, _picked(ours, start, self.first), truth)
            self.progress.step()


class _Compare:
    """A policy's own run against the exact outputs."""

    def __init__(self, outputs: list[list[Tensor]], first: int, layers: int) -> None:
        self.outputs, self.first = outputs, first
        self.tokens = [0] * layers
        self.steps = [0] * layers
        self.mean = _Mean(layers)

    def watch(self, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        start = self.tokens[layer]
        self.tokens[layer] += query.shape[2]
        truth = self.outputs[layer][self.steps[layer]]
        self.steps[layer] += 1
        self.mean.add(layer, _picked(output, start, self.first), truth)

    def means(self) -> list[float]:
        return self.mean.means()
