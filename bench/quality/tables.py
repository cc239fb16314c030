"""The harness's experiments as tables and plots."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from itertools import count, takewhile
from typing import Any

from ..record import table
from . import plots, texts
from .bound import HEADS, constant
from .policies import DEFAULT, Policy, title
from .run import Rows
from .stats import columns, gaps, jackknife, labels, paired, shown
from .sweep import of_axis, single_layer


def head(what: str, stored: dict[str, Any], more: str = "") -> str:
    versions = ", ".join(f"{k} {v}" for k, v in stored["versions"].items())
    stopped = " **The run's time ended before all was measured.**" if stored["stopped"] else ""
    names = stored["documents"]
    documents = f" {len(names)} documents ({', '.join(names)})." if names else ""
    return (
        f"## {what}\n\n`{stored['command']}`, {stored['date']}: {stored['model']}, "
        f"{stored['dtype']}, {stored['hardware']}, {stored['seconds']} s.{documents}{stopped} "
        f"{more}\nVersions: {versions}.\n"
    )


def _nll(name: str, stored: dict[str, Any]) -> str:
    rows = stored["rows"]
    found, slots = gaps(rows), columns(rows)
    listed = [x for x in labels(rows) if any((x, n) in found for n in slots)]
    ours = DEFAULT if DEFAULT in listed else "express"
    exact = [r["nll"] for r in rows if r["policy"] == "exact"]
    lines, beside = [], []
    for label in listed:
        lines.append({"cache": title(label)} | {
            f"{n:,} slots": shown(list(found[label, n].values())) if (label, n) in found else "-"
            for n in slots})  # fmt: skip
        if label != ours:
            beside.append({"cache": title(label)} | {
                f"{n:,} slots": paired(found, label, n, ours) for n in slots})  # fmt: skip
    plot = plots.bars(
        name,
        {title(label): {n: list(found[label, n].values()) for n in slots if (label, n) in found}
         for label in listed},
        "NLL gap to exact attention, nats a token", "slots",
    )  # fmt: skip
    return "\n".join([
        head("NLL gap to exact attention" + _small(stored), stored,
              f"Positions {stored['first']:,} to {stored['length'] - 1:,}, nats a token; exact: "
              f"{shown(exact)}. ± is one standard error over documents, whose gaps are means over "
              "seeds."),
        table(lines), "", plot,
        f"How much more each cache loses than {title(ours)}, document by document (paired):", "",
        table(beside), "",
    ])  # fmt: skip


def _small(stored: dict[str, Any]) -> str:
    return " (small run)" if stored["length"] < 8192 else ""


def _error(name: str, stored: dict[str, Any]) -> str:
    rows = stored["rows"]
    lines = []
    curves: dict[str, dict[str, list[float]]] = {}
    for slots in columns(rows):
        for label in labels(rows):
            some = [r for r in rows if r["policy"] == label and r["slots"] == slots]
            if not some:
                continue
            alone, streaming = ([statistics.fmean(r[k]) for r in some]
                                for k in ("exact", "streaming"))  # fmt: skip
            lines.append({
                "cache": title(label), "slots": f"{slots:,}", "exact inputs": shown(alone, 4),
                "streaming inputs": shown(streaming, 4),
                "last layer, exact": shown([r["exact"][-1] for r in some], 4),
                "last layer, streaming": shown([r["streaming"][-1] for r in some], 4),
            })  # fmt: skip
            if slots == columns(rows)[-1]:
                curves[title(label)] = {
                    k: [
                        statistics.fmean(layer) for layer in zip(*(r[k] for r in some), strict=True)
                    ]
                    for k in ("exact", "streaming")
                }
    plot = plots.layers(name, curves, columns(rows)[-1])
    return "\n".join([
        head("Attention-output error, layer by layer" + _small(stored), stored,
              f"Relative to exact attention's outputs, mean over heads and positions "
              f"{stored['first']:,} to {stored['length'] - 1:,}. With *exact inputs* every layer "
              "gets the exact model's queries, keys and values; with *streaming inputs* those of "
              "the model with the cache, so that errors of earlier layers compound."),
        table(lines), "", plot,
    ])  # fmt: skip


def _recall(name: str, stored: dict[str, Any]) -> str:
    rows = stored["rows"]
    asked = [r for r in rows if r["task"] != "repeated"]
    slots = columns(rows)
    parts = [
        head("Recall" + _small(stored), stored,
              "Needle: one number hidden in a text; pairs: eight numbers of eight words. *choice*: "
              "the right answer is likelier than seven others (1 in 8 by chance); *match*: greedy "
              "decoding gives it; log p: of the right answer, nats."),
    ]  # fmt: skip
    for task in dict.fromkeys(r["task"] for r in asked):
        lines = []
        for label in ("exact", *labels(asked)):
            for n in slots if label != "exact" else (0,):
                some = [
                    r
                    for r in asked
                    if r["task"] == task and r["policy"] == label and r["slots"] == n
                ]
                if some:
                    lines.append({
                        "cache": title(label), "slots": f"{n:,}" if n else "all",
                        "prompts": len(some),
                        "choice": shown([float(r["choice"]) for r in some], 2),
                        **_by_depth(asked, some),
                        "match": shown([float(r["match"]) for r in some], 2),
                        "log p": shown([r["log_probability"] for r in some], 2),
                    })  # fmt: skip
        parts += [f"### {task.capitalize()}", "", table(lines), ""]
    again = [r for r in rows if r["task"] == "repeated"]
    if again:
        parts += [_repeated(name, again, slots)]
    return "\n".join(parts)


def _by_depth(all_rows: Rows, some: Rows) -> dict[str, str]:
    """Share of right choices by where the fact stands, if there are several places."""
    depths = sorted({r["depth"] for r in all_rows})
    if len(depths) < 2:
        return {}
    found = {d: [float(r["choice"]) for r in some if r["depth"] == d] for d in depths}
    return {
        f"at {d:.0%}": f"{statistics.fmean(values):.2f}" if values else "-"
        for d, values in found.items()
    }


#: Policies with options that the plot of recall has too.
PLOTTED = ("express:profile=even", "keydiff:recent=256")


def _repeated(name: str, rows: Rows, slots: list[int]) -> str:
    """Share of exact's gain that is kept; its error by leaving out one document at a time."""
    distances = sorted({r["distance"] for r in rows})
    gain = {(r["policy"], r["slots"], r["distance"], r["document"]): r["control"] - r["second"]
            for r in rows}  # fmt: skip
    documents = list(dict.fromkeys(r["document"] for r in rows))
    lines = []
    points: dict[str, dict[int, tuple[float, float]]] = defaultdict(dict)
    for label in labels(rows):
        for n in slots:
            line = {"cache": title(label), "slots": f"{n:,}"}
            for d in distances:
                pairs = [(gain[label, n, d, x], gain["exact", 0, d, x]) for x in documents
                         if (label, n, d, x) in gain and ("exact", 0, d, x) in gain]  # fmt: skip
                if not pairs:
                    continue
                share, spread = jackknife(pairs)
                line[f"{d:,} tokens"] = (
                    f"{share:.2f}" if math.isnan(spread) else f"{share:.2f} ± {spread:.2f}"
                )
                if n == slots[-1] and (":" not in label or label in PLOTTED or "wide" in label):
                    points[title(label)][d] = (share, spread)
            if len(line) == 2 + len(distances):
                lines.append(line)
    exact = [f"{d:,}: {shown([gain['exact', 0, d, x] for x in documents])}" for d in distances]
    plot = plots.shares(f"{name}-repeated", points, f"{slots[-1]:,} slots")
    return "\n".join([
        "### Repeated passages", "",
        "A passage of 96 tokens comes again so many tokens later; what its first occurrence saves "
        "in NLL, against the same text without it, as a share of what it saves under exact "
        f"attention (nats a token: {'; '.join(exact)}).", "", table(lines), "", plot,
    ])  # fmt: skip


def _sweep(name: str, stored: dict[str, Any]) -> str:
    rows = stored["rows"]
    found, slots = gaps(rows), columns(rows)
    parts = [
        head("Sweep of defaults" + _small(stored), stored,
              f"Positions {stored['first']:,} to {stored['length'] - 1:,}, on documents that no "
              "other table uses. Each cell: NLL gap to exact attention, and in brackets the paired "
              "difference from express with equal layers (negative: better than that)."),
    ]  # fmt: skip
    layers = takewhile(set(labels(rows)).__contains__, map(single_layer, count()))
    axes = {axis: of_axis(axis, len(list(layers))) for axis in stored["axes"]}
    shown_labels = {_label(text, n) for texts in axes.values() for text in texts for n in slots}
    rest = [label for label in labels(rows) if label not in shown_labels | {"express"}]
    if rest:
        axes["others"] = tuple(rest)
    for axis, policies in axes.items():
        lines = []
        for text in ("express", *policies):
            line = {"cache": title(text)}
            for n in slots:
                label = _label(text, n)
                cell = found.get((label, n))
                line[f"{n:,} slots"] = "-" if not cell else (
                    f"{statistics.fmean(cell.values()):.3f}"
                    + ("" if text == "express" else f" ({paired(found, label, n)})")
                )  # fmt: skip
            lines.append(line)
        parts += [f"### {axis.capitalize()}", "", table(lines), ""]
    return "\n".join(parts)


def _label(text: str, slots: int) -> str:
    return Policy.parse(text, slots).label


def _bound(name: str, stored: dict[str, Any]) -> str:
    rows = [r for r in stored["rows"] if r["what"] == "error"]
    lines = []
    for rank, length, label in dict.fromkeys((r["rank"], r["length"], r["policy"]) for r in rows):
        line = {"inputs": f"rank {rank}", "tokens": f"{length:,}", "cache": label}
        for r in rows:
            if (r["rank"], r["length"], r["policy"]) == (rank, length, label):
                found = constant(statistics.fmean(r["errors"]), r["slots"], length)
                line[f"{r['slots']:,} slots"] = f"{shown(r['errors'])} ({found:.2f})"
        lines.append(line)
    peaks = [
        {"slots": f"{r['slots']:,}", "n_out": r["n_out"], "most entries": f"{r['most']:,}",
         "in n_out": f"{r['most'] / r['n_out']:.2f}"}
        for r in stored["rows"] if r["what"] == "peak"
    ]  # fmt: skip
    return "\n".join([
        head("How tight the published bounds are", stored,
              f"Random inputs of {HEADS} heads. Error: the largest of any output's "
              "coordinate at the last positions, as a part of the largest value's, mean over "
              "the heads; in brackets C of error = C log^1.5(n) / s, the same along a line where "
              "a bound is tight in s."),
        table(lines), "", "Entries that the published schedule's coreset holds at most within 2^20 "
        "tokens; the published bound is 6 n_out:", "",
        table(peaks), "",
    ])  # fmt: skip


def _texts() -> str:
    rows = [
        {"document": e.name, "kind": e.kind, "language": e.language, "package": e.package,
         "version": e.version, "licence": e.licence, "for": e.split}
        for e in texts.manifest()
    ]  # fmt: skip
    return (
        "## Documents\n\nSHA-256 and files: `bench/quality/manifest.json`.\n\n" + table(rows) + "\n"
    )


SECTIONS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "nll": _nll, "error": _error, "recall": _recall, "sweep": _sweep, "bound": _bound,
}  # fmt: skip
