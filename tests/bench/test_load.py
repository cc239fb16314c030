"""The load generator: the plan, the arithmetic of the report, a small load on the real server."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import statistics
from pathlib import Path

import pytest

from bench.load import __main__ as load
from bench.load import mix
from bench.load.client import Outcome
from bench.load.report import Objective, Run, percentile, plot, summary
from bench.load.watch import Watch, samples


def make_plan(**changed):
    arguments = {
        "requests": 400, "rate": 2.0, "kinds": list(mix.KINDS), "greedy": 0.1, "scale": 1.0,
        "budgets": [{}, {"memory_tokens": 512}], "chars_per_token": 4.0, "seed": 3,
    }  # fmt: skip
    return mix.plan(**{**arguments, **changed})


def test_the_same_seed_makes_the_same_load():
    assert make_plan() == make_plan()
    assert make_plan() != make_plan(seed=4)


def test_arrivals_are_a_poisson_process():
    times = [request.at for request in make_plan(requests=4000)]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.5, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.5, rel=0.1), "exponential: deviation = mean"


def test_lengths_kinds_and_budgets_follow_the_mix():
    requests = make_plan()
    documents = [len(r.prompt) / 4 for r in requests if r.kind == "document"]
    assert min(documents) >= 8192 and max(documents) <= mix.LONGEST
    small = [len(r.prompt) / 4 for r in make_plan(scale=0.1) if r.kind == "document"]
    assert min(small) >= 819 and max(small) <= 0.11 * mix.LONGEST
    assert {r.kind for r in requests} == set(mix.KINDS)
    assert 20 < sum(r.greedy for r in requests) < 60
    assert {str(r.budget) for r in requests if not r.greedy} == {"{}", "{'memory_tokens': 512}"}


def test_exact_changes_nothing_but_the_budget():
    for request in make_plan(requests=40):
        other = mix.exact(request)
        assert other.greedy == request.greedy
        assert request.greedy or other.budget == {"mode": "exact"}
        assert dataclasses.replace(other, budget=request.budget) == request


def test_percentiles():
    values = [float(v) for v in range(1, 101)]
    assert [percentile(values, q) for q in (0.5, 0.95, 1.0)] == [50, 95, 100]
    assert percentile([7.0], 0.5) == 7 and percentile([], 0.5) is None


def outcome(first, total, tokens=11, status="finished", kind="chat"):
    return Outcome(kind, 0.0, status, "", 100, tokens, first, total)


def test_goodput_counts_what_met_the_objective():
    outcomes = [
        outcome(0.5, 1.5),  # 0.1 s a token
        outcome(3.0, 4.0),  # first token too late
        outcome(0.5, 5.5),  # 0.5 s a token
        outcome(None, 0.1, 0, "refused"),
        outcome(None, 9.0, 0, "failed", "document"),
    ]
    points = [{"at": 0, "kv_cache_usage": 0.25}, {"at": 1, "kv_cache_usage": 0.5}]
    row = summary(Run("express", outcomes, points, 0, 2.0), None, Objective(1.0, 0.2))
    assert (row["sent"], row["finished"], row["refused"], row["failed"]) == (5, 3, 1, 1)
    assert row["goodput, requests/s"] == 0.5 and row["in SLO"] == "1 of 5"
    assert row["TTFT p50, s"] == 0.5 and row["TPOT p95, ms"] == 500
    assert row["tokens/s"] == 16.5 and row["peak KV cache, %"] == 50


def test_rounds_are_joined_end_to_end():
    watch = Watch("", preemptions=[7.0, 7.0, 9.0], points=[{"at": 1.0, "running": 2}])
    run = Run.of("exact", [outcome(0.5, 1.5)], watch, 10.0)
    run.add(Run.of("exact", [outcome(0.5, 1.5)], watch, 20.0))
    assert (run.preemptions, run.seconds, len(run.outcomes)) == (4, 30.0, 2)
    assert [o.sent for o in run.outcomes] == [0.0, 10.0]
    assert [p["at"] for p in run.points] == [1.0, 11.0]


def test_samples_reads_one_metric():
    text = '# TYPE a gauge\na{engine="0"} 1.5\na{engine="1"} 2\na_total{engine="0"} 9\nab 4\n'
    assert samples(text, "a") == [1.5, 2.0]


@pytest.mark.server
def test_a_small_load_on_the_real_server(server, tmp_path):
    options = argparse.Namespace(
        url=server.url, exact_url=None, only=None, model=None, rounds=1, rate=4.0, requests=5,
        mix="chat,document,long", budgets="256,default", greedy=0.3, scale=0.1, seed=11,
        style="auto", api_key="none", timeout=120.0,
    )  # fmt: skip
    runs, details = asyncio.run(load.run(options))
    assert [run.name for run in runs] == ["express", "exact"]
    for run in runs:
        statuses = [o.status for o in run.outcomes]
        errors = [o.error for o in run.outcomes]
        assert set(statuses) == {"finished", "refused"}, errors
        for one in run.outcomes:
            if one.status == "finished":
                assert one.first_token_s is not None and 0 < one.first_token_s < one.total_s
                assert one.answer_tokens >= 4 and one.prompt_tokens > 10
            else:
                assert "1000000000" in one.error
        assert run.peak("kv_cache_usage") > 0
    assert details["model"] == "small"
    pytest.importorskip("matplotlib", reason="matplotlib draws the plot: pip install matplotlib")
    plot(runs, Objective(5, 0.2), tmp_path / "load.png", "small load")
    assert (tmp_path / "load.png").stat().st_size > 10_000


def test_the_documented_numbers_are_the_stored_ones():
    root = Path(__file__).parents[2]
    stored = json.loads((root / "bench" / "results" / "speed" / "load-cpu.json").read_text())
    page = (root / "docs" / "operations.md").read_text()
    lines = page.split("<!-- load -->")[1].split("<!-- /load -->")[0].splitlines()
    header, _, *rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert rows == [[str(row[name]) for name in header] for row in stored["rows"]]
    assert set(stored["requests"]) == {"express", "exact"} and stored["command"].endswith(
        "--name load-cpu"
    )
