"""Outcomes to numbers, a table and a plot that is readable in grey."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .client import Outcome
from .watch import Watch


@dataclass(frozen=True)
class Objective:
    """What counts as served well: seconds to the first token and for each later one."""

    first_token_s: float
    token_s: float

    def met(self, outcome: Outcome) -> bool:
        if outcome.status != "finished" or outcome.first_token_s is None:
            return False
        return outcome.first_token_s <= self.first_token_s and (
            outcome.token_s is None or outcome.token_s <= self.token_s
        )


@dataclass
class Run:
    """One pass of a plan, or several of them: `name` is express or exact."""

    name: str
    outcomes: list[Outcome]
    points: list[dict[str, float]]
    preemptions: int
    seconds: float

    @classmethod
    def of(cls, name: str, outcomes: list[Outcome], watch: Watch, seconds: float) -> Run:
        return cls(name, outcomes, watch.points, watch.preempted(), seconds)

    def add(self, later: Run) -> None:
        """Append another pass, as if it had followed without a pause."""
        self.outcomes += [replace(o, sent=o.sent + self.seconds) for o in later.outcomes]
        self.points += [{**p, "at": round(p["at"] + self.seconds, 2)} for p in later.points]
        self.preemptions += later.preemptions
        self.seconds += later.seconds

    def peak(self, name: str) -> float | None:
        """The most that a gauge of the server showed."""
        return max((point[name] for point in self.points if name in point), default=None)


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of the values do not exceed."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def summary(run: Run, kind: str | None, objective: Objective) -> dict[str, Any]:
    """One row: a kind of request, or all of them."""
    outcomes = [o for o in run.outcomes if kind in (None, o.kind)]
    finished = [o for o in outcomes if o.status == "finished"]
    first = [o.first_token_s for o in finished if o.first_token_s is not None]
    later = [o.token_s for o in finished if o.token_s is not None]
    met = sum(objective.met(o) for o in outcomes)
    row: dict[str, Any] = {
        "mode": run.name,
        "requests": kind or "all",
        "sent": len(outcomes),
        "finished": len(finished),
        "refused": sum(o.status in ("refused", "turned away") for o in outcomes),
        "failed": sum(o.status == "failed" for o in outcomes),
        "TTFT p50, s": rounded(percentile(first, 0.5)),
        "TTFT p95, s": rounded(percentile(first, 0.95)),
        "TPOT p50, ms": rounded(percentile(later, 0.5), 1000),
        "TPOT p95, ms": rounded(percentile(later, 0.95), 1000),
        "in SLO": f"{met} of {len(outcomes)}",
        "goodput, requests/s": rounded(met / run.seconds),
        "tokens/s": rounded(sum(o.answer_tokens for o in finished) / run.seconds),
    }
    if kind is None:
        row |= {
            "peak KV cache, %": rounded(run.peak("kv_cache_usage"), 100),
            "peak running": rounded(run.peak("running")),
            "peak waiting": rounded(run.peak("waiting")),
            "preemptions": run.preemptions,
        }
    return row


def rounded(value: float | None, factor: float = 1) -> float | None:
    """Three digits: enough to compare, too few to pretend."""
    return None if value is None else float(f"{factor * value:.3g}")


def plot(runs: Sequence[Run], objective: Objective, path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    (first, later), (cache, done) = axes
    styles = {"express": ("black", "-", "o"), "exact": ("0.55", "--", "s")}
    for run in runs:
        colour, dash, marker = styles.get(run.name, ("0.3", ":", "^"))
        look = {"color": colour, "linestyle": dash, "linewidth": 1.8, "label": run.name}
        finished = [o for o in run.outcomes if o.status == "finished"]
        for axis, values in (
            (first, [o.first_token_s for o in finished]),
            (later, [None if o.token_s is None else 1000 * o.token_s for o in finished]),
        ):
            ordered = sorted(v for v in values if v is not None)
            share = [100 * (i + 1) / len(ordered) for i in range(len(ordered))]
            axis.plot(ordered, share, drawstyle="steps-post", marker=marker, markersize=3, **look)
        points = [p for p in run.points if "kv_cache_usage" in p]
        cache.plot([p["at"] for p in points], [100 * p["kv_cache_usage"] for p in points], **look)
        ends = sorted(o.sent + o.total_s for o in run.outcomes if objective.met(o))
        done.plot([0, *ends], range(len(ends) + 1), drawstyle="steps-post", **look)
    for axis, value in ((first, objective.first_token_s), (later, 1000 * objective.token_s)):
        axis.axvline(value, color="0.3", linewidth=0.8, linestyle=":")
        axis.annotate("SLO", (value, 3), fontsize=8, xytext=(3, 0), textcoords="offset points")
    for axis, name, x, y in (
        (first, "Time to first token", "seconds", "% of finished requests"),
        (later, "Time per output token", "milliseconds", "% of finished requests"),
        (cache, "KV cache in use", "seconds since the start", "% of the pool"),
        (done, "Requests finished within the SLO", "seconds since the start", "requests"),
    ):
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_xlabel(x, fontsize=9)
        axis.set_ylabel(y, fontsize=9)
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
        if y == "requests":
            axis.yaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=9, frameon=False, loc="best")
    figure.savefig(path, dpi=110)
    plt.close(figure)
