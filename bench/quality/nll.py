"""Negative log-likelihood of real documents under each policy, teacher-forced, in nats a token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .harness import Heads, Stream, log_probabilities
from .policies import Policy, seeded
from .progress import Progress

#: Means are also stored for parts of the positions of this many tokens.
BUCKET = 1024


def measure(
    model: Any, heads: Heads, documents: dict[str, list[int]], policies: Sequence[Policy],
    seeds: Sequence[int], first: int, chunk: int, batch: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row per policy, slots, seed and document."""
    runs = [(p, s) for p in policies for s in (seeds if seeded(p) else seeds[:1])]
    groups = list(_groups(documents, batch))
    length = len(next(iter(documents.values())))
    chunks = -(-(length - 1) // chunk)
    rows = []
    with Progress("nll", len(runs) * len(groups) * heads.layers * chunks) as progress:
        for policy, seed in runs:
            for names, ids in groups:
                ids = ids.to(model.device)
                stream = Stream(model, policy.caches(heads, seed), tick=progress.step)
                progress.say(f"{policy.label} {policy.slots}")
                hidden = stream.feed(ids[:, :-1], chunk)
                found, _ = log_probabilities(model, hidden, ids[:, 1:])
                _check_peak(policy, stream)
                for name, row in zip(names, -found.double().cpu(), strict=True):
                    rows.append(_row(policy, seed, name, row, first, stream.peak))
    return rows


def _groups(documents: dict[str, list[int]], batch: int) -> Iterable[tuple[list[str], Tensor]]:
    names = list(documents)
    for at in range(0, len(names), batch):
        part = names[at : at + batch]
        yield part, torch.tensor([documents[name] for name in part])


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
