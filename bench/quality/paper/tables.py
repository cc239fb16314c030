"""The paper's experiments in docs/results.md: tables and plots from the stored rows."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from ...record import table
from .. import plots
from ..plots import Point
from ..policies import place, title
from ..run import Rows
from ..stats import gaps, mean_error, shown
from ..tables import head

TITLES = {
    "express": "Express (equal layers)", "hyper": "HyperAttention-style",
    "streaming": "StreamingLLM",
    "FA2": "FlashAttention 2 (torch)", "FA3": "FlashAttention 3 (vLLM)",
    "full": "nothing removed", "snapkv": "SnapKV", "pyramid": "PyramidKV",
    "itself": "Express alone",
}  # fmt: skip
#: What the paper says of its own implementation; nothing else of it is quoted.
THEIRS = (
    "The paper reports up to 82 times over FlashAttention 2 for its implementation: their figure, "
    "on their machine, with their settings."
)


def middle(values: Sequence[float]) -> tuple[float, float]:
    """Median and half the interquartile range: others' load does not spread times evenly."""
    if len(values) < 2:
        return values[0], math.nan
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, (high - low) / 2


def _duration(values: Sequence[float], digits: int = 1) -> str:
    median, spread = middle(values)
    return f"{median:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")


def _small(stored: dict[str, Any]) -> str:
    return " (small run)" if stored["small"] else ""


def _gap(rows: Rows, base: Rows) -> list[float]:
    """NLL of each document above that of `base`, means over seeds."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        values[row["document"]].append(row["nll"])
    exact = {row["document"]: row["nll"] for row in base}
    return [statistics.fmean(v) - exact[name] for name, v in values.items() if name in exact]


def _where(rows: Rows, **values: Any) -> Rows:
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def _distinct(rows: Rows, key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


# --- prefill ---


def prefill(name: str, stored: dict[str, Any]) -> str:
    rows = [row for row in stored["rows"] if row["what"] == "perplexity"]
    base = _where(rows, method="exact")
    exact = [row["nll"] for row in base]
    parts = [
        head(
            "Paper: prefill with approximate attention" + _small(stored), stored,
            "The last layers' attention is replaced, the others are exact. Perplexity over the "
            f"tokens from position {min(stored['slots'])} on, and in brackets the NLL gap to the "
            f"exact model in nats a token (± one standard error over documents); exact: "
            f"{_perplexity(exact)}. The paper keeps the first and last 32 tokens exact; here "
            "Express and StreamingLLM keep 4 sinks and their window, and the HyperAttention-style "
            "estimator the leaves of its causal recursion, of half the slots; its block and its "
            "samples have a quarter of the slots each, at every level of the recursion, so that "
            "its queries read more than the others'.",
        ),
        table(_replaced(rows, base)), "", _replaced_plot(name, rows, base),
    ]  # fmt: skip
    timed = [row for row in stored["rows"] if row["what"] == "time"]
    if timed:
        return "\n".join([*parts, _times(name, timed)])
    return "\n".join([*parts, "The time of prefill attention needs a GPU: not in this run. "
                      + THEIRS, ""])  # fmt: skip


def _perplexity(nll: Sequence[float]) -> str:
    return f"{math.exp(statistics.fmean(nll)):.2f}"


def _replaced(rows: Rows, base: Rows) -> Rows:
    lines = []
    some = [row for row in rows if row["method"] != "exact"]
    for slots in sorted(set(_distinct(some, "slots"))):
        for method in _distinct(some, "method"):
            line = {"attention": TITLES[method], "slots": f"{slots:,}"}
            for count in sorted(set(_distinct(some, "layers"))):
                found = _where(some, method=method, slots=slots, layers=count)
                line[f"last {count} layers"] = "-" if not found else (
                    f"{_perplexity([r['nll'] for r in found])} ({shown(_gap(found, base))})"
                )  # fmt: skip
            lines.append(line)
    return lines


def _replaced_plot(name: str, rows: Rows, base: Rows) -> str:
    lines: dict[str, list[Point]] = defaultdict(list)
    slots = max(_distinct(rows, "slots"))
    for method in _distinct(_where(rows, slots=slots), "method"):
        lines[TITLES[method]].append((0, 0, 0, 0))
        found = _where(rows, method=method, slots=slots)
        for count in sorted(set(_distinct(found, "layers"))):
            gap = mean_error(_gap(_where(found, layers=count), base))
            lines[TITLES[method]].append((count, 0, *gap))
    return plots.curves(f"{name}-perplexity", lines, "replaced layers, from the last one on",
                  f"NLL gap, nats a token ({slots:,} slots)")  # fmt: skip


def _times(name: str, rows: Rows) -> str:
    lines, plots = [], []
    for masked, kind in ((True, "causal"), (False, "unmasked")):
        points: dict[str, list[Point]] = {}
        for method in _distinct(rows, "method"):
            found = sorted(_where(rows, method=method, causal=masked), key=lambda r: r["tokens"])
            if not found:
                continue
            lines.append({"attention": TITLES[method], "mask": kind} | {
                f"{n:,} tokens": _time(rows, masked, method, n)
                for n in sorted(set(_distinct(rows, "tokens")))})  # fmt: skip
            points[TITLES[method]] = [(r["tokens"], 0, *middle(r["ms"])) for r in found]
        what = f"one layer's {kind} prefill attention, ms"
        plots.append(
            plots.curves(f"{name}-time-{kind}", points, "prompt, tokens", what, logarithmic=True)
        )
    return "\n".join([
        "### Time of one layer's prefill attention", "",
        f"32 query and 8 KV heads of 128, bfloat16, batch 1, {rows[0]['slots']:,} slots, "
        "compression included; ms, median ± half the interquartile range of the repetitions, and "
        "in brackets how many times faster than FlashAttention 2. Unmasked, Express lets all "
        "queries attend to what its cache holds in the end. The HyperAttention-style estimator is "
        "plain torch in fp32: its "
        f"time says how it grows, not how fast it can be. {THEIRS}",
        "", table(lines), "", *plots,
    ])  # fmt: skip


def _time(rows: Rows, masked: bool, method: str, tokens: int) -> str:
    found = _where(rows, causal=masked, method=method, tokens=tokens)
    if not found:
        return "-"
    text = _duration(found[0]["ms"], 2)
    rival = _where(rows, causal=masked, method="FA2", tokens=tokens)
    if method == "FA2" or not rival:
        return text
    ratio = middle(rival[0]["ms"])[0] / middle(found[0]["ms"])[0]
    return f"{text} ({ratio:.1f})"


# --- compress ---


def compress(name: str, stored: dict[str, Any]) -> str:
    rows = stored["rows"]
    bars: dict[str, dict[int, list[float]]] = defaultdict(dict)
    lines = []
    for slots in _distinct(rows, "slots"):
        some = _where(rows, slots=slots)
        base = _where(some, what="nll", prefill="exact", method="full")
        alone = _where(some, what="nll", method="itself")
        for kind in _distinct(some, "prefill"):
            for method in _distinct(_where(some, prefill=kind), "method"):
                found = _where(some, prefill=kind, method=method)
                again = _where(found, what="nll")
                if not again:
                    continue
                gap = _gap(again, base)
                label = TITLES[method] if method == "itself" else f"{kind} + {TITLES[method]}"
                bars[label][slots] = gap
                lines.append({
                    "prefill": kind, "method": TITLES[method], "slots": f"{slots:,}",
                    "used": f"{again[0]['used']:,.0f}",
                    "NLL gap": "0" if again == base else shown(gap),
                    "above Express alone": "0" if again == alone else shown(_gap(again, alone)),
                    **{f"{task}, {what}": _share(found, task, what)
                       for task in ("needle", "pairs") for what in ("choice", "match")},
                })  # fmt: skip
    plot = plots.bars(name, bars, "NLL gap of the continuation, nats a token", "slots")
    return "\n".join([
        head(
            "Paper: compressing the cache after the prompt" + _small(stored), stored,
            f"Prompts of {stored['length']:,} tokens, then {stored['continuation']} that are "
            "scored. A method compresses once, at the prompt's end, to so many slots that with the "
            "scored tokens it holds what Express alone may hold (*used*: per layer and KV head, "
            "mean over layers; PyramidKV gives early layers more), and fewer before. NLL gap to "
            "exact attention and nothing removed, and document by document to Express alone, ± one "
            "standard error over documents; *choice*: the right answer is likelier than seven "
            "others; *match*: greedy decoding gives it.",
        ),
        table(lines), "", plot,
    ])  # fmt: skip


def _share(rows: Rows, task: str, what: str) -> str:
    found = [float(row[what]) for row in _where(rows, what=task)]
    return shown(found, 2) if found else "-"


# --- size and time ---


def _in_order(labels: Sequence[str]) -> list[str]:
    return sorted(dict.fromkeys(labels), key=place)


def _gaps(rows: Rows) -> dict[tuple[str, int], list[float]]:
    found = gaps(_where(rows, what="nll"))
    return {key: list(values.values()) for key, values in found.items()}


def size(name: str, stored: dict[str, Any]) -> str:
    gaps, slots = _gaps(stored["rows"]), stored["slots"]
    labels = _in_order([label for label, _ in gaps])
    lines = [
        {"cache": title(label)} | {
            f"{n:,} slots": shown(gaps[label, n]) if (label, n) in gaps else "-" for n in slots}
        for label in labels
    ]  # fmt: skip
    points = {
        title(label): [(n, 0.0, *mean_error(gaps[label, n])) for n in slots
                              if (label, n) in gaps]
        for label in labels
    }  # fmt: skip
    exact = [row["nll"] for row in _where(stored["rows"], what="nll") if row["policy"] == "exact"]
    return "\n".join([
        head(
            "Paper: accuracy against cache size in long decoding" + _small(stored), stored,
            f"A prompt of {stored['first']} tokens, then teacher-forced to position "
            f"{stored['length'] - 1:,}; NLL gap to exact attention in nats a token (exact: "
            f"{shown(exact)}), ± one standard error over documents.",
        ),
        table(lines), "",
        plots.curves(name, points, "budget, slots", "NLL gap to exact attention, nats a token",
               dodge=True),
        *_answers(stored["rows"]),
    ])  # fmt: skip


def _answers(rows: Rows) -> list[str]:
    """Share of right greedy answers, if there was a file of questions."""
    asked = _where(rows, what="answers")
    slots = sorted({row["slots"] for row in asked if row["slots"]})
    lines = []
    for label in _distinct(asked, "policy"):
        line = {"cache": title(label)}
        for n in slots or [0]:
            found = _where(asked, policy=label, slots=0 if label == "exact" else n)
            line[f"{n:,} slots"] = shown([float(r["right"]) for r in found], 2) if found else "-"
        lines.append(line)
    head = f"Share of right greedy answers to {len(set(_distinct(asked, 'question')))} questions:"
    return [head, "", table(lines), ""] if lines else []


def time(name: str, stored: dict[str, Any]) -> str:
    rows, gaps = stored["rows"], _gaps(stored["rows"])
    lines, points = [], defaultdict(list)
    timed = _where(rows, what="time")
    order = _in_order([row["policy"] for row in timed])
    for row in sorted(timed, key=lambda r: (order.index(r["policy"]), r["slots"])):
        label, n = row["policy"], row["slots"]
        gap = [0.0] if label in ("exact", "torch") else gaps.get((label, n))
        exact = {"exact": "exact, our kernel", "torch": "exact, torch SDPA"}
        name_of = exact.get(label) or title(label)
        lines.append({
            "cache": name_of, "slots": f"{n:,}" if n else "all", "entries read": f"{row['live']:,}",
            "µs a token": _duration(row["us"], 3),
            "NLL gap": "0" if not n else shown(gap) if gap else "-",
        })  # fmt: skip
        if gap:
            points[name_of].append((*middle(row["us"]), *mean_error(gap)))
    return "\n".join([
        head(
            "Paper: accuracy against attention's time a token" + _small(stored), stored,
            "One layer's decode attention with the model's heads, "
            f"a batch of {stored['requests']}, each after {stored['length']:,} tokens: "
            "microseconds a token and request by the kernel that serves, compactions not included, "
            "median ± half the interquartile range of the repetitions; NLL gap as in the table of "
            "sizes, ± one standard error over documents.",
        ),
        table(lines), "",
        plots.curves(name, points, "attention of one layer, µs a token",
               "NLL gap to exact attention, nats a token"),
    ])  # fmt: skip


SECTIONS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "paper-prefill": prefill, "paper-compress": compress, "paper-size": size, "paper-time": time,
}  # fmt: skip
