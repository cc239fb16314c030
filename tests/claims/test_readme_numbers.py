"""The figures of README and of a page of docs are those of stored results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def rows(name):
    """The stored rows of vLLM's own attention and of express."""
    return json.loads((ROOT / "bench" / "results" / "speed" / f"{name}.json").read_text())["rows"]


def line(start):
    """The cells of the table row that starts so."""
    (found,) = re.findall(rf"^\| ({re.escape(start)}.*) \|$", README, re.M)
    return [cell.strip() for cell in found.split("|")]


@pytest.mark.parametrize(("name", "start", "figure", "form"), [
    ("engine", "8B model: first token", "first token at 131072, s", "{:.1f} s"),
    ("engine", "requests that run at once", "requests, 8192 tokens of output", "{}"),
    ("engine", "output tokens per second", "tokens/s, 8192 tokens of output", "{:,}"),
    ("reuse", "64 answers at once", "document: tokens/s", "{:,.0f}"),
    ("engine-70b", "70B model: first token", "first token at 131072, s", "{:.1f} s"),
])  # fmt: skip
def test_speed(name, start, figure, form):
    flash, express = (row[figure] for row in rows(name)[:2])
    _, *cells, gain = line(start)
    assert cells == [form.format(flash), form.format(express)]
    assert gain.startswith(f"{max(flash, express) / min(flash, express):.1f} times")


def test_likelihood():
    table = (ROOT / "docs" / "results" / "likelihood.md").read_text()
    plain = re.sub(r" ± [\d.]+", "", table)
    for budget in ("512", "1,024", "2,048"):
        for cell in line(f"{budget} tokens")[1:]:
            assert cell in plain, cell
    loss = line("express | always")[-1]
    assert f"| {loss} (" in plain


def test_recall():
    share = line("**Bad news:**")[2].split("%")[0]
    assert f"0.{share} ± " in (ROOT / "docs" / "results" / "recall.md").read_text()


def test_soak():
    """The sentence of docs/caching.md about ten minutes of chats."""
    stored = json.loads((ROOT / "bench/results/speed/soak-chats.json").read_text())
    page = (ROOT / "docs" / "caching.md").read_text()
    told = page.partition("## What was seen")[2].partition("##")[0]
    counts, share = stored["counts"], stored["share_of_prompt_tokens_cached"]
    assert f"{counts['200']:,} answers and {counts['cut']:,} that were cut off" in told
    assert f"{share:.1%} of the prompts' tokens were cached" in told
    warm = [row for row in stored["rows"] if row["minutes"] >= stored["rows"][-1]["minutes"] / 3]
    for name in ("API server", "engine", "worker"):
        sizes = [row[f"{name}, MiB"] for row in warm]
        assert f"the {name} {min(sizes):.0f} to {max(sizes):.0f}" in told
