"""The tables of docs/results/ and the plots, from bench/results/: nothing in them is typed.

A page is prose with marked places.  Between `<!-- TABLE of RESULT -->` and the next `<!-- end -->`
stands a table of a stored result, which `python -m bench.quality report` writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import record
from . import figures, tables
from .paper import figures as paper_figures
from .paper import tables as paper

PAGES = record.ROOT / "docs" / "results"
MARK = re.compile(
    r"(<!-- (?P<table>[^<>]+?) of (?P<result>[\w/-]+) -->\n).*?(<!-- end -->)", re.DOTALL
)

#: What a mark may name -> makes the table of a stored result.
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "run": tables.run, "losses": tables.losses, "behind": tables.behind, "errors": tables.errors,
    "behind equal layers": lambda stored: tables.behind(stored, "express"),
    "needle": lambda stored: tables.asked(stored, "needle"),
    "pairs": lambda stored: tables.asked(stored, "pairs"),
    "repeated": tables.repeated,
    "bound errors": tables.bound_errors, "bound peaks": tables.bound_peaks,
    "replaced": paper.replaced, "prefill times": paper.prefill_times,
    "compressed": paper.compressed, "sizes": paper.sizes, "answers": paper.answers,
    "times": paper.times,
}  # fmt: skip
#: Plot -> the stored result that it shows, and what draws it.
PLOTS: dict[str, tuple[str, Callable[[str, dict[str, Any]], None]]] = {
    "quality/likelihood": ("quality/likelihood", figures.losses),
    "quality/attention-error": ("quality/attention-error", figures.errors),
    "quality/recall": ("quality/recall", figures.repeated),
    "quality/recall-wide": ("quality/recall-wide", figures.repeated),
    "paper/prefill-perplexity": ("paper/prefill", paper_figures.replaced),
    "paper/prefill-time-causal": ("paper/prefill", paper_figures.causal_times),
    "paper/prefill-time-unmasked": ("paper/prefill", paper_figures.unmasked_times),
    "paper/compress": ("paper/compress", paper_figures.compressed),
    "paper/size": ("paper/size", paper_figures.sizes),
    "paper/time": ("paper/time", paper_figures.times),
}
#: Experiment -> the tables that `python -m bench.quality report RESULT` prints.
PRINTED = {
    "nll": ("losses", "behind"), "error": ("errors",), "recall": ("needle", "pairs", "repeated"),
    "bound": ("bound errors", "bound peaks"), "paper-prefill": ("replaced",),
    "paper-compress": ("compressed",), "paper-size": ("sizes", "answers"),
    "paper-time": ("times",),
}  # fmt: skip


def write() -> None:
    """Fill all marks of all pages and draw all plots."""
    for page in pages():
        page.write_text(filled(page.read_text()))
        print(page.name)
    for name, (result, draw) in PLOTS.items():
        draw(name, record.load(result))
        print(f"{name}.png")


def pages() -> list[Path]:
    return sorted(PAGES.glob("*.md"))


def filled(text: str) -> str:
    """A page with its tables as the stored results have them."""

    def fill(mark: re.Match) -> str:
        return f"{mark[1]}\n{_table(mark['table'], mark['result'])}\n\n{mark[4]}"

    return MARK.sub(fill, text)


def _table(name: str, result: str) -> str:
    if name == "documents":
        return tables.documents()
    stored = record.load(result)
    if name.startswith("axis "):
        return tables.axis(stored, name.removeprefix("axis "))
    return TABLES[name](stored)


def show(result: str) -> None:
    """Print the tables of a stored result."""
    stored = record.load(result)
    kinds = PRINTED.get(stored["experiment"], ())
    axes = [f"axis {axis}" for axis in [*stored.get("axes", ()), "others"] if not kinds]
    for kind in (*kinds, *axes, "run"):
        print(f"\n{result}: {kind}\n\n{_table(kind, result)}")
