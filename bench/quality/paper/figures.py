"""The plots of the paper's experiments: bench/results/paper/."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from .. import plots
from ..plots import Point
from ..policies import title
from ..stats import mean_error
from .tables import EXACT, TITLES, above, distinct, in_order, losses, middle, where

Stored = dict[str, Any]


def replaced(name: str, stored: Stored) -> None:
    rows = where(stored["rows"], what="perplexity")
    base, slots = where(rows, method="exact"), max(distinct(rows, "slots"))
    lines: dict[str, list[Point]] = {}
    for method in distinct(where(rows, slots=slots), "method"):
        found = where(rows, method=method, slots=slots)
        lines[TITLES[method]] = [(0, 0, 0, 0)] + [
            (count, 0, *mean_error(above(where(found, layers=count), base)))
            for count in sorted(distinct(found, "layers"))
        ]
    plots.curves(name, lines, "replaced layers, from the last one on",
                 f"NLL gap, nats a token ({slots:,} slots)")  # fmt: skip


def causal_times(name: str, stored: Stored) -> None:
    _times(name, stored, True, "causal")


def unmasked_times(name: str, stored: Stored) -> None:
    _times(name, stored, False, "unmasked")


def _times(name: str, stored: Stored, masked: bool, kind: str) -> None:
    rows = where(stored["rows"], what="time")
    points: dict[str, list[Point]] = {}
    for method in distinct(where(rows, causal=masked), "method"):
        found = sorted(where(rows, method=method, causal=masked), key=lambda r: r["tokens"])
        points[TITLES[method]] = [(r["tokens"], 0, *middle(r["ms"])) for r in found]
    what = f"one layer's {kind} prefill attention, ms"
    plots.curves(name, points, "prompt, tokens", what, logarithmic=True)


def compressed(name: str, stored: Stored) -> None:
    bars: dict[str, dict[int, list[float]]] = defaultdict(dict)
    for slots in distinct(stored["rows"], "slots"):
        some = where(stored["rows"], slots=slots, what="nll")
        base = where(some, prefill="exact", method="full")
        for kind in distinct(some, "prefill"):
            for method in distinct(where(some, prefill=kind), "method"):
                label = TITLES[method] if method == "itself" else f"{kind} + {TITLES[method]}"
                bars[label][slots] = above(where(some, prefill=kind, method=method), base)
    plots.bars(name, bars, "NLL gap of the continuation, nats a token")


def sizes(name: str, stored: Stored) -> None:
    found = losses(stored)
    points: dict[str, list[Point]] = {
        title(label): [(n, 0.0, *mean_error(found[label, n])) for n in stored["slots"]
                       if (label, n) in found]
        for label in in_order([label for label, _ in found])
    }  # fmt: skip
    plots.curves(name, points, "budget, slots", "NLL gap to exact attention, nats a token",
                 dodge=True)  # fmt: skip


def times(name: str, stored: Stored) -> None:
    found, points = losses(stored), defaultdict(list)
    timed = where(stored["rows"], what="time")
    order = in_order(distinct(timed, "policy"))
    for row in sorted(timed, key=lambda r: (order.index(r["policy"]), r["slots"])):
        label = row["policy"]
        gap = [0.0] if label in EXACT else found.get((label, row["slots"]))
        if gap:
            point = (*middle(row["us"]), *mean_error(gap))
            points[EXACT.get(label) or title(label)].append(point)
    plots.curves(name, points, "attention of one layer, µs a token",
                 "NLL gap to exact attention, nats a token")  # fmt: skip
