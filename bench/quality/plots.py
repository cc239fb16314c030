"""Ways to plot: black and grey only, so that print and screen say the same.

Each stores bench/results/<name>.png.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..record import RESULTS
from .stats import mean_error

LINES = ("-", "--", "-.", ":")
HATCHES = ("", "///", "...", "xxx", "---")
MARKERS = "os^Dv<>P*X"
#: Mean and standard error of x, then of y.
Point = tuple[float, float, float, float]


def _figure(width: float = 7.2, height: float = 4.0) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 10, "hatch.linewidth": 0.6})
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")


def _store(figure: Any, name: str) -> None:
    from matplotlib import pyplot

    figure.savefig(RESULTS / f"{name}.png", dpi=120)
    pyplot.close(figure)


def bars(name: str, bars: dict[str, dict[int, list[float]]], axis: str) -> None:
    """Horizontal bars, one group a cache, one bar a budget."""
    budgets = sorted({n for values in bars.values() for n in values})
    figure, axes = _figure(height=0.8 + 0.16 * len(bars) * (len(budgets) + 1.2))
    step = 0.85 / len(budgets)
    for j, n in enumerate(budgets):
        places, means, spreads = [], [], []
        for i, values in enumerate(bars.values()):
            if n in values:
                mean, spread = mean_error(values[n])
                places.append(i + (j - (len(budgets) - 1) / 2) * step)
                means.append(mean)
                spreads.append(0 if math.isnan(spread) else spread)
        shade = 0.9 - 0.6 * j / max(1, len(budgets) - 1)
        axes.barh(places, means, step * 0.95, xerr=spreads, color=str(shade), edgecolor="black",
                  hatch=HATCHES[j], capsize=2, label=f"{n:,} slots",
                  error_kw={"linewidth": 1})  # fmt: skip
    axes.set_yticks(range(len(bars)), list(bars))
    axes.set_ylim(len(bars) - 0.45, -0.55)
    axes.set_xlabel(axis)
    axes.grid(axis="x", color="0.85")
    axes.set_axisbelow(True)
    figure.legend(frameon=False, loc="outside upper center", ncols=len(budgets))
    _store(figure, name)


def layers(name: str, curves: dict[str, dict[str, list[float]]], slots: int) -> None:
    figure, axes = _figure()
    for i, (label, kinds) in enumerate(curves.items()):
        shade = str(0.65 * i / max(1, len(curves) - 1))
        for kind, line in (("exact", "--"), ("streaming", "-")):
            axes.plot(kinds[kind], line, color=shade, marker=MARKERS[i], markersize=4, markevery=3,
                      label=label if kind == "streaming" else None)  # fmt: skip
    axes.set_xlabel("layer (solid: streaming inputs, dashed: exact inputs)")
    axes.set_ylabel(f"relative error, {slots:,} slots")
    axes.set_ylim(bottom=0)
    axes.grid(color="0.85")
    figure.legend(frameon=False, fontsize=9, loc="outside right upper")
    _store(figure, name)


def shares(name: str, points: dict[str, dict[int, tuple[float, float]]], what: str) -> None:
    """A group of markers for every distance: side by side, so that error bars stay apart."""
    figure, axes = _figure()
    distances = sorted({d for values in points.values() for d in values})
    step = 0.8 / len(points)
    for i, (label, values) in enumerate(points.items()):
        x = [distances.index(d) + (i - (len(points) - 1) / 2) * step for d in values]
        y, spread = zip(*values.values(), strict=True)
        spread = [0 if math.isnan(s) else s for s in spread]
        shade = str(0.6 * i / max(1, len(points) - 1))
        axes.errorbar(x, y, yerr=spread, color=shade, capsize=2, linestyle="none", markersize=7,
                      marker=MARKERS[i % len(MARKERS)], label=label)  # fmt: skip
    axes.set_xticks(range(len(distances)), [f"{d:,}" for d in distances])
    axes.set_xlim(-0.5, len(distances) - 0.5)
    axes.set_xlabel("distance, tokens")
    axes.set_ylabel(f"share of exact's gain kept, {what}")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.grid(axis="y", color="0.85")
    figure.legend(frameon=False, fontsize=9, loc="outside right upper")
    _store(figure, name)


def curves(
    name: str, lines: dict[str, list[Point]], x_axis: str, y_axis: str, logarithmic: bool = False,
    dodge: bool = False,
) -> None:  # fmt: skip
    """Lines with error bars that differ in marker, dash and grey; `dodge` sets those of equal x
    side by side."""
    figure, axes = _figure()
    apart = 0.012 * max(p[0] for points in lines.values() for p in points) if dodge else 0.0
    for i, (label, points) in enumerate(lines.items()):
        x, x_error, y, y_error = zip(*points, strict=True)
        beside = [value + apart * (i - (len(lines) - 1) / 2) for value in x]
        axes.errorbar(
            beside, y, xerr=_bars(x_error), yerr=_bars(y_error), label=label, capsize=3,
            markersize=6, linestyle=LINES[i % len(LINES)],
            marker=MARKERS[i % len(MARKERS)],
            color=str(0.6 * i / max(1, len(lines) - 1)),
        )  # fmt: skip
    if logarithmic:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({p[0] for points in lines.values() for p in points})
        axes.set_xticks(ticks, [f"{int(n) // 1024}K" for n in ticks])
        axes.minorticks_off()
    else:
        axes.margins(x=0.08)
        axes.set_xlim(left=0)
        axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel(x_axis)
    axes.set_ylabel(y_axis)
    axes.grid(color="0.85")
    axes.set_axisbelow(True)
    figure.legend(frameon=False, fontsize=9, loc="outside right upper")
    _store(figure, name)


def _bars(errors: Sequence[float]) -> list[float]:
    return [0.0 if math.isnan(error) else error for error in errors]
