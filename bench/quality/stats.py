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


def with_error(mean: float, spread: float, digits: int) -> str:
    if math.isnan(spread):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def shown(values: Sequence[float], digits: int = 3) -> str:
    return with_error(*mean_error(values), digits)


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


def per_cent(values: Sequence[float]) -> str:
    """A mean loss in nats as what it adds to the perplexity."""
    return f"{100 * math.expm1(statistics.fmean(values)):.1f}%"


def repeated_shares(rows: Rows) -> dict[tuple[str, int], dict[int, tuple[float, float]]]:
    """(policy, slots) -> distance -> share of exact's gain from a passage's first occurrence that
    is kept, and its error by leaving out one document at a time."""
    gain = gains(rows)
    documents = list(dict.fromkeys(r["document"] for r in rows))
    found: dict[tuple[str, int], dict[int, tuple[float, float]]] = defaultdict(dict)
    for label in labels(rows):
        for n in columns(rows):
            for d in sorted({r["distance"] for r in rows}):
                pairs = [(gain[label, n, d, x], gain["exact", 0, d, x]) for x in documents
                         if (label, n, d, x) in gain and ("exact", 0, d, x) in gain]  # fmt: skip
                if pairs:
                    found[label, n][d] = jackknife(pairs)
    return found


def gains(rows: Rows) -> dict[tuple[str, int, int, str], float]:
    """(policy, slots, distance, document) -> nats a token that the first occurrence saves."""
    return {(r["policy"], r["slots"], r["distance"], r["document"]): r["control"] - r["second"]
            for r in rows}  # fmt: skip


def layer_curves(rows: Rows) -> dict[str, dict[str, list[float]]]:
    """Policy -> inputs -> attention error by layer, mean over documents, at the most slots."""
    most = columns(rows)[-1]
    found: dict[str, dict[str, list[float]]] = {}
    for label in labels(rows):
        some = [r for r in rows if r["policy"] == label and r["slots"] == most]
        if some:
            found[label] = {
                kind: [statistics.fmean(layer) for layer in zip(*(r[kind] for r in some),
                                                                strict=True)]
                for kind in ("exact", "streaming")
            }  # fmt: skip
    return found
