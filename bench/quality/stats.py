"""Numbers from stored rows: means with standard errors, losses against exact attention, shares."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from .policies import place
from .run import Rows

#: (policy, slots) -> document -> NLL minus exact's.
Gaps = dict[tuple[str, int], dict[str, float]]


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (nan for one value)."""
    mean = statistics.fmean(values)
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return mean, spread


def shown(values: Sequence[float], digits: int = 3) -> str:
    mean, spread = mean_error(values)
    if math.isnan(spread):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def gaps(rows: Rows, part: str | None = None) -> Gaps:
    """(policy, slots) -> document -> NLL minus exact's, mean over seeds.

    What ran on some of the documents only, since time was up, is left out.
    """
    found: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    exact = {r["document"]: r for r in rows if r["policy"] == "exact"}

    def value(row: dict[str, Any]) -> float:
        return row["nll"] if part is None else row["parts"][part]

    for row in rows:
        if row["policy"] != "exact" and row["document"] in exact:
            found[row["policy"], row["slots"]][row["document"]].append(
                value(row) - value(exact[row["document"]])
            )
    return {
        key: {name: statistics.fmean(values) for name, values in documents.items()}
        for key, documents in found.items()
        if len(documents) == len(exact)
    }


def columns(rows: Rows) -> list[int]:
    return sorted({r["slots"] for r in rows if r["policy"] != "exact"})


def labels(rows: Rows) -> list[str]:
    """Ours first, variants of a cache together."""
    found = dict.fromkeys(r["policy"] for r in rows if r["policy"] != "exact")
    return sorted(found, key=place)


def paired(found: Gaps, label: str, slots: int, base: str = "express") -> str:
    """How much more a policy loses than `base`, document by document."""
    ours, theirs = found.get((base, slots)), found.get((label, slots))
    if not ours or not theirs:
        return "-"
    return shown([theirs[d] - ours[d] for d in ours if d in theirs])


def jackknife(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Ratio of sums, and its standard error from leaving out one pair at a time."""

    def ratio(some: Iterable[tuple[float, float]]) -> float:
        top, bottom = map(sum, zip(*some, strict=True))
        return top / bottom

    count = len(pairs)
    if count < 2:
        return ratio(pairs), math.nan
    left = [ratio(pairs[:i] + pairs[i + 1 :]) for i in range(count)]
    mean = statistics.fmean(left)
    return ratio(pairs), math.sqrt((count - 1) / count * sum((x - mean) ** 2 for x in left))
