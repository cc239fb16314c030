"""The paper's experiments as Markdown tables."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from ...record import table
from ..policies import place, title
from ..run import Rows
from ..stats import gaps, shown, with_error

Stored = dict[str, Any]
TITLES = {
    "express": "Express (equal layers)", "hyper": "HyperAttention-style",
    "streaming": "StreamingLLM",
    "FA2": "FlashAttention 2 (torch)", "FA3": "FlashAttention 3 (vLLM)",
    "full": "nothing removed", "snapkv": "SnapKV", "pyramid": "PyramidKV",
    "itself": "Express alone",
}  # fmt: skip


def middle(values: Sequence[float]) -> tuple[float, float]:
    """Median and half the interquartile range: others' load does not spread times evenly."""
    if len(values) < 2:
        return values[0], math.nan
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, (high - low) / 2


def above(rows: Rows, base: Rows) -> list[float]:
    """NLL of each document above that of `base`, means over seeds."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        values[row["document"]].append(row["nll"])
    exact = {row["document"]: row["nll"] for row in base}
    return [statistics.fmean(v) - exact[name] for name, v in values.items() if name in exact]


def where(rows: Rows, **values: Any) -> Rows:
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def distinct(rows: Rows, key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def perplexity(nll: Sequence[float]) -> str:
    return f"{math.exp(statistics.fmean(nll)):.2f}"


def replaced(stored: Stored) -> str:
    """Perplexity with the attention of the last layers replaced."""
    rows = where(stored["rows"], what="perplexity")
    base, some = where(rows, method="exact"), [r for r in rows if r["method"] != "exact"]
    lines = []
    for slots in sorted(distinct(some, "slots")):
        for method in distinct(some, "method"):
            line = {"attention": TITLES[method], "slots": f"{slots:,}"}
            for count in sorted(distinct(some, "layers")):
                found = where(some, method=method, slots=slots, layers=count)
                line[f"last {count} layers"] = "-" if not found else (
                    f"{perplexity([r['nll'] for r in found])} ({shown(above(found, base))})"
                )  # fmt: skip
            lines.append(line)
    return (
        f"Perplexity from position {min(stored['slots'])} on and, in brackets, nats a token above "
        f"the exact model's, ± one standard error over documents. Exact: "
        f"{perplexity([r['nll'] for r in base])}.\n\n" + table(lines)
    )


def prefill_times(stored: Stored) -> str:
    """Of one layer's attention, on a GPU."""
    rows = where(stored["rows"], what="time")
    lines = [
        {"attention": TITLES[method], "mask": kind}
        | {f"{n:,} tokens": _time(rows, masked, method, n)
           for n in sorted(distinct(rows, "tokens"))}
        for masked, kind in ((True, "causal"), (False, "unmasked"))
        for method in distinct(where(rows, causal=masked), "method")
    ]  # fmt: skip
    return (
        f"Milliseconds, median ± half the interquartile range, {rows[0]['slots']:,} slots; in "
        "brackets how many times faster than FlashAttention 2.\n\n" + table(lines)
    )


def _time(rows: Rows, masked: bool, method: str, tokens: int) -> str:
    found = where(rows, causal=masked, method=method, tokens=tokens)
    if not found:
        return "-"
    text = with_error(*middle(found[0]["ms"]), 2)
    rival = where(rows, causal=masked, method="FA2", tokens=tokens)
    if method == "FA2" or not rival:
        return text
    ratio = middle(rival[0]["ms"])[0] / middle(found[0]["ms"])[0]
    return f"{text} ({ratio:.1f})"


def compressed(stored: Stored) -> str:
    """What each method loses that compresses the prompt's cache once."""
    lines = []
    for slots in distinct(stored["rows"], "slots"):
        some = where(stored["rows"], slots=slots)
        base = where(some, what="nll", prefill="exact", method="full")
        alone = where(some, what="nll", method="itself")
        for kind in distinct(some, "prefill"):
            for method in distinct(where(some, prefill=kind), "method"):
                found = where(some, prefill=kind, method=method)
                again = where(found, what="nll")
                if not again:
                    continue  # time was up
                lines.append({
                    "prefill": kind, "method": TITLES[method], "slots": f"{slots:,}",
                    "used": f"{again[0]['used']:,.0f}",
                    "NLL gap": "0" if again == base else shown(above(again, base)),
                    "above Express alone": "0" if again == alone else shown(above(again, alone)),
                    **{f"{task}, {what}": _share(found, task, what)
                       for task in ("needle", "pairs") for what in ("choice", "match")},
                })  # fmt: skip
    return table(lines)


def _share(rows: Rows, task: str, what: str) -> str:
    found = [float(row[what]) for row in where(rows, what=task)]
    return shown(found, 2) if found else "-"


def in_order(labels: Sequence[str]) -> list[str]:
    return sorted(dict.fromkeys(labels), key=place)


def losses(stored: Stored) -> dict[tuple[str, int], list[float]]:
    found = gaps(where(stored["rows"], what="nll"))
    return {key: list(values.values()) for key, values in found.items()}


def sizes(stored: Stored) -> str:
    found = losses(stored)
    lines = [
        {"cache": title(label)} | {
            f"{n:,} slots": shown(found[label, n]) if (label, n) in found else "-"
            for n in stored["slots"]}
        for label in in_order([label for label, _ in found])
    ]  # fmt: skip
    exact = [r["nll"] for r in where(stored["rows"], what="nll") if r["policy"] == "exact"]
    return (
        f"Positions {stored['first']} to {stored['length'] - 1:,}, nats a token above exact "
        f"attention ({shown(exact)}), ± one standard error over documents.\n\n" + table(lines)
    )


def answers(stored: Stored) -> str:
    """Share of right greedy answers, if there was a file of questions."""
    asked = where(stored["rows"], what="answers")
    slots = sorted({row["slots"] for row in asked if row["slots"]})
    lines = []
    for label in distinct(asked, "policy"):
        line = {"cache": title(label)}
        for n in slots or [0]:
            found = where(asked, policy=label, slots=0 if label == "exact" else n)
            line[f"{n:,} slots"] = shown([float(r["right"]) for r in found], 2) if found else "-"
        lines.append(line)
    return table(lines)


#: What a row of times is of, if not of a policy.
EXACT = {"exact": "exact, our kernel", "torch": "exact, torch SDPA"}


def times(stored: Stored) -> str:
    """Attention's time a token and the loss, of every policy and budget."""
    found, timed = losses(stored), where(stored["rows"], what="time")
    order = in_order(distinct(timed, "policy"))
    lines = []
    for row in sorted(timed, key=lambda r: (order.index(r["policy"]), r["slots"])):
        label, n = row["policy"], row["slots"]
        gap = found.get((label, n))
        lines.append({
            "cache": EXACT.get(label) or title(label), "slots": f"{n:,}" if n else "all",
            "entries read": f"{row['live']:,}",
            "µs a token": with_error(*middle(row["us"]), 3),
            "NLL gap": "0" if not n else shown(gap) if gap else "-",
        })  # fmt: skip
    return (
        f"A batch of {stored['requests']}, each after {stored['length']:,} tokens: microseconds a "
        "token and request, median ± half the interquartile range; nats a token above exact "
        "attention, ± one standard error over documents.\n\n" + table(lines)
    )
