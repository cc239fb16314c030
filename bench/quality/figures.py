"""The plot of each stored result of the harness: bench/results/<name>.png."""

from __future__ import annotations

from typing import Any

from . import plots
from .policies import title
from .stats import columns, gaps, labels, layer_curves, repeated_shares

#: Policies with options that the plot of recall has too.
PLOTTED = ("express:profile=even", "keydiff:recent=256")


def losses(name: str, stored: dict[str, Any]) -> None:
    rows = stored["rows"]
    found, slots = gaps(rows), columns(rows)
    bars = {
        title(label): {n: list(found[label, n].values()) for n in slots if (label, n) in found}
        for label in labels(rows)
    }
    plots.bars(name, bars, "NLL gap to exact attention, nats a token")


def errors(name: str, stored: dict[str, Any]) -> None:
    rows = stored["rows"]
    curves = {title(label): kinds for label, kinds in layer_curves(rows).items()}
    plots.layers(name, curves, columns(rows)[-1])


def repeated(name: str, stored: dict[str, Any]) -> None:
    """At the most slots."""
    rows = [r for r in stored["rows"] if r["task"] == "repeated"]
    most = columns(rows)[-1]
    points = {
        title(label): shares
        for (label, n), shares in repeated_shares(rows).items()
        if n == most and (":" not in label or label in PLOTTED or "wide" in label)
    }
    plots.shares(name, points, f"{most:,} slots")
