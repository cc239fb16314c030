"""Draw every panel from Prometheus alone, without Grafana, one PNG a dashboard.

    python deploy/grafana/render.py --prometheus http://localhost:9090 --minutes 60 --output /tmp

Prints the panels whose queries return nothing and exits with 1 if there are any.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from panels import DASHBOARDS, Dashboard, Panel
from queries import substitute

#: Okabe and Ito's colours, with dashes and widths that also tell them apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))
ROW_INCHES, STAT_INCHES = 2.6, 1.1
UNITS = {"s": "seconds", "percentunit": "%", "reqps": "requests/s"}


class Prometheus:
    """The queries of a panel over one span of time."""

    def __init__(self, url: str, minutes: float, window: str) -> None:
        self.client = httpx.Client(base_url=url, timeout=30)
        self.end = time.time()
        self.start = self.end - 60 * minutes
        self.step = max(1.0, (self.end - self.start) / 200)
        self.variables = {"$__rate_interval": window, "$model": ".*", "$instance": ".*"}

    def series(self, panel: Panel) -> list[tuple[str, list[float], list[float]]]:
        """(legend, minutes since the start, values) of each series that has a finite value."""
        found = []
        for query in panel.queries:
            answer = self.client.get(
                "/api/v1/query_range",
                params={
                    "query": substitute(query.expr, self.variables),
                    "start": self.start,
                    "end": self.end,
                    "step": self.step,
                },
            )
            answer.raise_for_status()
            for result in answer.json()["data"]["result"]:
                points = self.points(result["values"])
                if points:
                    name = legend(query.legend, result["metric"])
                    found.append((name, [t for t, _ in points], [v for _, v in points]))
        return found

    def points(self, values: list[tuple[float, str]]) -> list[tuple[float, float]]:
        """(minutes since the start, value), with a NaN where a gap breaks the line."""
        points: list[tuple[float, float]] = []
        last = math.inf
        for time_, text in values:
            if math.isfinite(value := float(text)):
                if time_ - last > 4 * self.step:
                    points.append(((last + time_ - 2 * self.start) / 120, math.nan))
                points.append(((time_ - self.start) / 60, value))
                last = time_
        return points


def legend(template: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        template = template.replace("{{" + name + "}}", value)
    return template


def empty(prometheus: Prometheus) -> list[str]:
    """Panels with a query that returns no data."""
    missing = []
    for board in DASHBOARDS:
        for _, panels in board.rows:
            for panel in panels:
                for query in panel.queries:
                    alone = Panel(panel.title, panel.about, (query,))
                    if not prometheus.series(alone):
                        missing.append(f"{board.title}: {panel.title}: {query.expr}")
    return missing


def draw(board: Dashboard, prometheus: Prometheus, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [line for title, panels in board.rows for line in split(title, panels)]
    heights = [STAT_INCHES if line[1][0].kind == "stat" else ROW_INCHES for line in lines]
    figure = plt.figure(figsize=(15, sum(heights) + 0.4 * len(lines)), layout="constrained")
    figure.suptitle(board.title, fontsize=15, fontweight="bold")
    for part, (title, panels) in zip(
        figure.subfigures(len(lines), 1, height_ratios=heights, squeeze=False)[:, 0],
        lines,
        strict=True,
    ):
        if title:
            part.suptitle(title, x=0.01, ha="left", fontsize=12, color="0.35")
        widths = [panel.width for panel in panels]
        axes = part.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            plot(axis, panel, prometheus.series(panel))
            if panel.kind != "stat":
                axis.set_xlim(0, (prometheus.end - prometheus.start) / 60)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def split(title: str, panels: tuple[Panel, ...]) -> list[tuple[str, list[Panel]]]:
    """A row's panels in lines of Grafana's 24 columns; the first line has the title."""
    lines: list[tuple[str, list[Panel]]] = [(title, [])]
    for panel in panels:
        if sum(p.width for p in lines[-1][1]) + panel.width > 24:
            lines.append(("", []))
        lines[-1][1].append(panel)
    return lines


def plot(axis: Any, panel: Panel, series: list[tuple[str, list[float], list[float]]]) -> None:
    axis.set_title(panel.title, fontsize=10, loc="left")
    scale = 100 if panel.unit == "percentunit" else 1
    if panel.kind == "stat":
        axis.axis("off")
        text = f"{scale * series[0][2][-1]:.3g}" if series else "no data"
        text += "%" if scale == 100 and series else ""
        axis.text(0, 0.3, text, fontsize=22, transform=axis.transAxes)
        return
    top = 0.0
    for number, (name, times, values) in enumerate(series):
        values = [scale * value for value in values]
        top = max(top, *(value for value in values if math.isfinite(value)), 0)
        style: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": DASHES[number % len(DASHES)],
        }
        axis.plot(times, values, label=name, linewidth=1.8, **style)
    if not series:
        axis.text(0.5, 0.5, "no data", ha="center", transform=axis.transAxes, color="0.5")
    axis.set_ylim(0, 1.1 * (scale * panel.maximum if panel.maximum else top) or 1)
    for value, colour in panel.thresholds:
        if scale * value < axis.get_ylim()[1]:
            axis.axhline(scale * value, color=colour, linewidth=0.8)
    axis.set_ylabel(UNITS.get(panel.unit, ""), fontsize=8)
    axis.set_xlabel("minutes", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(color="0.9")
    axis.spines[["top", "right"]].set_visible(False)
    if series:
        axis.legend(
            fontsize=8, frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1.01, 0.98),
            borderpad=0.1, handlelength=2.2, columnspacing=1,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--prometheus", default="http://localhost:9090", metavar="URL")
    parser.add_argument("--minutes", type=float, default=60, help="span, up to now")
    parser.add_argument("--window", default="1m", help="of rate(): four scrapes or more")
    parser.add_argument("--output", type=Path, default=Path(), metavar="FOLDER")
    options = parser.parse_args()
    prometheus = Prometheus(options.prometheus, options.minutes, options.window)
    options.output.mkdir(parents=True, exist_ok=True)
    for board in DASHBOARDS:
        path = options.output / f"{board.uid}.png"
        draw(board, prometheus, path)
        print(path)
    missing = empty(prometheus)
    for line in missing:
        print(f"no data: {line}")
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
