"""The harness's stored results as Markdown tables, each with a line on what stands in it."""

from __future__ import annotations

import statistics
from itertools import count, takewhile
from typing import Any

from ..record import table
from . import texts
from .bound import HEADS, constant
from .policies import DEFAULT, Policy, title
from .recall import TASKS
from .run import Rows
from .stats import (
    columns,
    gains,
    gaps,
    labels,
    paired,
    per_cent,
    repeated_shares,
    shown,
    with_error,
)  # fmt: skip
from .sweep import of_axis, single_layer

Stored = dict[str, Any]


def run(stored: Stored) -> str:
    """How a result was measured."""
    ways = stored.get("parts") or [stored]
    names = stored["documents"]
    lines = [
        f"- {stored['model']}, {stored['dtype']}, {stored['hardware']}, {stored['seconds']} s",
        *([f"- {len(names)} documents: {', '.join(names)}"] if names else []),
        "- " + ", ".join(f"{k} {v}" for k, v in stored["versions"].items()),
        *(f"- {way['date']}, commit {way.get('commit', 'not recorded')}: `{way['command']}`"
          for way in ways),
        *([f"- joined by `{stored['command']}`"] if "parts" in stored else []),
        *(["- **The time ended before all was measured.**"] if stored["stopped"] else []),
    ]  # fmt: skip
    return "\n".join(["<details><summary>How this was measured</summary>", "", *lines, "",
                      "</details>"])  # fmt: skip


def _positions(stored: Stored) -> str:
    return f"Positions {stored['first']:,} to {stored['length'] - 1:,}"


def losses(stored: Stored) -> str:
    """NLL above exact attention's, in nats a token and in per cent of perplexity."""
    rows = stored["rows"]
    found, slots = gaps(rows), columns(rows)
    exact = [r["nll"] for r in rows if r["policy"] == "exact"]
    lines = []
    for label in labels(rows):
        cells = {n: list(found[label, n].values()) for n in slots if (label, n) in found}
        if cells:
            lines.append({"cache": title(label)} | {
                f"{n:,} slots": f"{shown(cells[n])} ({per_cent(cells[n])})" if n in cells else "-"
                for n in slots})  # fmt: skip
    return (
        f"{_positions(stored)}, nats a token and, in brackets, per cent of perplexity. Exact "
        f"attention: {shown(exact)} nats. ± is one standard error over documents.\n\n"
        + table(lines)
    )


def behind(stored: Stored, ours: str = DEFAULT) -> str:
    """How much more each cache loses than `ours`, document by document."""
    rows = stored["rows"]
    found, slots = gaps(rows), columns(rows)
    if ours not in labels(rows):
        ours = "express"
    lines = [
        {"cache": title(label)} | {f"{n:,} slots": paired(found, label, n, ours) for n in slots}
        for label in labels(rows)
        if label != ours and any((label, n) in found for n in slots)
    ]
    return f"Nats a token more than {title(ours)}, ± one paired standard error.\n\n" + table(lines)


def errors(stored: Stored) -> str:
    rows = stored["rows"]
    lines = []
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
    return (
        f"{_positions(stored)}, relative to exact attention's outputs, mean over heads, ± one "
        "standard error over documents.\n\n" + table(lines)
    )


def asked(stored: Stored, task: str) -> str:
    """Needles or pairs: the share of right answers."""
    assert task in TASKS
    rows = [r for r in stored["rows"] if r["task"] == task]
    lines = []
    for label in ("exact", *labels(rows)):
        for n in columns(rows) if label != "exact" else (0,):
            some = [r for r in rows if r["policy"] == label and r["slots"] == n]
            if some:
                lines.append({
                    "cache": title(label), "slots": f"{n:,}" if n else "all",
                    "prompts": len(some),
                    "choice": shown([float(r["choice"]) for r in some], 2),
                    **_by_depth(rows, some),
                    "match": shown([float(r["match"]) for r in some], 2),
                    "log p": shown([r["log_probability"] for r in some], 2),
                })  # fmt: skip
    return table(lines)


def _by_depth(rows: Rows, some: Rows) -> dict[str, str]:
    """Share of right choices by where the fact stands, if there are several places."""
    depths = sorted({r["depth"] for r in rows})
    if len(depths) < 2:
        return {}
    found = {d: [float(r["choice"]) for r in some if r["depth"] == d] for d in depths}
    return {
        f"at {d:.0%}": f"{statistics.fmean(values):.2f}" if values else "-"
        for d, values in found.items()
    }


def repeated(stored: Stored) -> str:
    """Share of exact's gain from a passage's first occurrence that is kept."""
    rows = [r for r in stored["rows"] if r["task"] == "repeated"]
    distances = sorted({r["distance"] for r in rows})
    lines = [
        {"cache": title(label), "slots": f"{n:,}"}
        | {f"{d:,} tokens": with_error(*shares[d], 2) for d in distances}
        for (label, n), shares in repeated_shares(rows).items()
        if len(shares) == len(distances)
    ]
    gain = gains(rows)
    saved = {d: [gain[key] for key in gain if key[:3] == ("exact", 0, d)] for d in distances}
    exact = "; ".join(f"{d:,} tokens: {shown(values)}" for d, values in saved.items())
    return f"Exact attention saves, in nats a token: {exact}.\n\n" + table(lines)


def axis(stored: Stored, name: str) -> str:
    """What one axis of a sweep tried, against express with equal layers."""
    rows = stored["rows"]
    found, slots = gaps(rows), columns(rows)
    if name == "others":
        policies = _others(stored)
    else:
        layers = takewhile(set(labels(rows)).__contains__, map(single_layer, count()))
        policies = of_axis(name, len(list(layers)))
    slots = [n for n in slots if any((Policy.parse(p, n).label, n) in found for p in policies)]
    lines = []
    for text in ("express", *policies):
        line = {"cache": title(text)}
        for n in slots:
            label = Policy.parse(text, n).label
            cell = found.get((label, n))
            line[f"{n:,} slots"] = "-" if not cell else (
                f"{statistics.fmean(cell.values()):.3f}"
                + ("" if text == "express" else f" ({paired(found, label, n)})")
            )  # fmt: skip
        lines.append(line)
    return table(lines)


def _others(stored: Stored) -> list[str]:
    """What a sweep tried that is on none of its axes."""
    rows = stored["rows"]
    known = {
        Policy.parse(text, n).label
        for name in stored["axes"]
        for text in of_axis(name, 0)
        for n in columns(rows)
    }
    return [label for label in labels(rows) if label not in known | {"express"}]


def bound_errors(stored: Stored) -> str:
    rows = [r for r in stored["rows"] if r["what"] == "error"]
    lines = []
    for rank, length, label in dict.fromkeys((r["rank"], r["length"], r["policy"]) for r in rows):
        line = {"inputs": f"rank {rank}", "tokens": f"{length:,}", "cache": label}
        for r in rows:
            if (r["rank"], r["length"], r["policy"]) == (rank, length, label):
                found = constant(statistics.fmean(r["errors"]), r["slots"], length)
                line[f"{r['slots']:,} slots"] = f"{shown(r['errors'])} ({found:.2f})"
        lines.append(line)
    return f"Mean over {HEADS} heads.\n\n" + table(lines)


def bound_peaks(stored: Stored) -> str:
    return table([
        {"slots": f"{r['slots']:,}", "n_out": r["n_out"], "most entries": f"{r['most']:,}",
         "in n_out": f"{r['most'] / r['n_out']:.2f}"}
        for r in stored["rows"] if r["what"] == "peak"
    ])  # fmt: skip


def documents() -> str:
    return table([
        {"document": e.name, "kind": e.kind, "language": e.language, "package": e.package,
         "version": e.version, "licence": e.licence, "for": e.split}
        for e in texts.manifest()
    ])  # fmt: skip
