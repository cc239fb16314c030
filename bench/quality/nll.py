"""Negative log-likelihood of real documents under each policy, teacher-forced, in nats a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .harness import Stream, log_probabilities
from .policies import USUAL, Policy, every
from .progress import Progress
from .run import Result, Rows, Run

FILE = "quality/likelihood"
SPLIT = "report"
BATCH = 64
# Few evictions first: a small budget takes the longest.
FULL = {"slots": [2048, 1024, 512], "length": 8192, "first": 2048, "seeds": [0, 1],
        "policies": USUAL}  # fmt: skip
SMALL = {"slots": [512], "length": 3072, "first": 1024, "documents": 3, "seeds": [0],
         "policies": USUAL}  # fmt: skip
#: Means are also stored for parts of the positions of this many tokens.
BUCKET = 1024


def measure(run: Run) -> Result:
    return losses(run, every(run.options.policies, run.options.slots)), {}


def losses(run: Run, policies: Sequence[Policy]) -> Rows:
    """A row per policy, slots, seed and document."""
    options, seeds, layers = run.options, run.options.seeds, run.heads.layers
    cases = [(p, s) for p in policies for s in (seeds if p.method.seeded else seeds[:1])]
    batches = list(run.batches(options.length))
    chunks = -(-(options.length - 1) // options.chunk)
    rows = []
    with Progress("nll", len(cases) * len(batches) * layers * chunks) as progress:
        for policy, seed in cases:
            for names, ids in batches:
                stream = Stream(run.model, policy.caches(run.heads, seed), tick=progress.step)
                progress.say(f"{policy.label} {policy.slots}")
                hidden = stream.feed(ids[:, :-1], options.chunk)
                found, _ = log_probabilities(run.model, hidden, ids[:, 1:])
                _check_peak(policy, stream)
                for name, row in zip(names, -found.double().cpu(), strict=True):
                    rows.append(_row(policy, seed, name, row, options.first, stream.peak))
    return rows


def _check_peak(policy: Policy, stream: Stream) -> None:
    used = sum(cache.peak for cache in stream.caches) / len(stream.caches)
    if policy.name != "exact" and used > policy.slots:
        raise AssertionError(f"{policy.label} used {used:.0f} of {policy.slots} slots a layer")


def _row(
    policy: Policy, seed: int, name: str, nll: Tensor, first: int, peak: int
) -> dict[str, Any]:  # fmt: skip
    """nll [T - 1]: of the tokens at positions 1, 2, ..."""
    parts = {
        str(start): round(float(nll[max(start, first) - 1 : start + BUCKET - 1].mean()), 5)
        for start in range(first // BUCKET * BUCKET, len(nll) + 1, BUCKET)
        if len(nll[max(start, first) - 1 : start + BUCKET - 1]) >= BUCKET // 4
    }
    return {
        "policy": policy.label, "slots": policy.slots, "seed": seed, "document": name,
        "nll": round(float(nll[first - 1 :].mean()), 5), "peak": peak, "parts": parts,
    }  # fmt: skip
