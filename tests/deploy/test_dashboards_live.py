"""A real Prometheus scrapes the real server under load: every panel and every rule has data."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml
from serving import free_port

from bench.load import __main__ as load

DEPLOY = Path(__file__).parents[2] / "deploy"
sys.path.insert(0, str(DEPLOY / "grafana"))

import queries  # noqa: E402
import render  # noqa: E402

pytestmark = [
    pytest.mark.ops,
    pytest.mark.server,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="prometheus is missing: apt install prometheus"
    ),
]
REQUESTS = 16


@pytest.fixture(scope="module")
def server(small_server):
    return small_server


@pytest.fixture(scope="module")
def prometheus(server, tmp_path_factory):
    """The repository's own configuration, pointed at the test's server and made faster."""
    folder = tmp_path_factory.mktemp("prometheus")
    shutil.copytree(DEPLOY / "prometheus", folder / "config")
    config = folder / "config" / "prometheus.yml"
    config.write_text(config.read_text().replace("interval: 15s", "interval: 1s"))
    target = server.url.removeprefix("http://")
    (folder / "config" / "targets.yml").write_text(yaml.safe_dump([{"targets": [target]}]))
    port = free_port()
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(
            ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
             f"--web.listen-address=127.0.0.1:{port}"],
            stdout=log, stderr=log,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while not ready(url):
            assert process.poll() is None, (folder / "log.txt").read_text()[-3000:]
            assert time.monotonic() < deadline, "prometheus did not start"
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def ready(url):
    try:
        return httpx.get(f"{url}/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def ask(url, query):
    answer = httpx.get(f"{url}/api/v1/query", params={"query": query})
    return {
        tuple(sorted(result["metric"].items())): float(result["value"][1])
        for result in answer.raise_for_status().json()["data"]["result"]
    }


@pytest.fixture(scope="module")
def loaded(server, prometheus):
    """-> (Prometheus's address, the runs of the load, counts before it)."""
    while not ask(prometheus, "up == 1"):
        time.sleep(0.5)
    time.sleep(3)
    before = ask(prometheus, "sum by (mode) (vllm:express_requests_total)")
    options = argparse.Namespace(
        url=server.url, exact_url=None, only=None, model=None, rounds=1, rate=1.0,
        requests=REQUESTS, mix="chat,document,long", budgets="256,default,512", greedy=0.15,
        scale=0.08, seed=2,
        style="auto", api_key="none", timeout=300.0,
    )  # fmt: skip
    runs, _ = asyncio.run(load.run(options))
    time.sleep(3)
    return prometheus, runs, before


def test_every_query_is_about_something_that_the_real_server_exports(server):
    server.client.get("/v1/models")  # HTTP metrics appear with the first answer
    known = queries.exported(server.client.get("/metrics").text)
    assert queries.problems(known, queries.expressions()) == []


def test_every_panel_returns_data(loaded):
    source = render.Prometheus(loaded[0], minutes=5, window="20s")
    assert render.empty(source) == []


def test_every_rule_is_loaded_healthy_and_recorded(loaded):
    groups = httpx.get(f"{loaded[0]}/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert [rule["lastError"] for rule in rules if rule["health"] != "ok"] == []
    assert {rule["name"] for rule in rules if rule["type"] == "recording"} == queries.recorded()
    for name in queries.recorded():
        found = httpx.get(
            f"{loaded[0]}/api/v1/query", params={"query": f"last_over_time({name}[5m])"}
        )
        assert found.json()["data"]["result"], f"{name} recorded nothing"
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []


def test_prometheus_counts_what_the_clients_saw(loaded):
    url, runs, before = loaded
    after = ask(url, "sum by (mode) (vllm:express_requests_total)")
    grown = {dict(key)["mode"]: after[key] - before.get(key, 0) for key in after}
    finished = {r.name: sum(o.status == "finished" for o in r.outcomes) for r in runs}
    # One request warmed the server up for each pass.
    assert grown == {"express": finished["express"] + 2, "exact": finished["exact"]}
    refused = sum(o.status == "refused" for run in runs for o in run.outcomes)
    assert refused > 0
    assert sum(ask(url, "sum(vllm:express_refused_requests_total)").values()) >= refused


def test_held_slots_stay_below_exact_and_return_to_zero(loaded):
    url = loaded[0]
    peak = "max_over_time({}[5m])"
    held = max(ask(url, peak.format("vllm:express_held_kv_tokens")).values())
    exact = max(ask(url, peak.format("vllm:express_exact_kv_tokens")).values())
    assert 0 < held <= exact
    assert set(ask(url, "vllm:express_held_kv_tokens").values()) == {0}
    ratio = ask(url, "min_over_time(express:held_kv_tokens:ratio[5m])")
    assert 0 < min(ratio.values()) < 0.9, "budgets of 256 and 512 hold less than exact attention"


def test_panels_are_drawn(loaded, tmp_path):
    pytest.importorskip("matplotlib")
    source = render.Prometheus(loaded[0], minutes=3, window="20s")
    for board in render.DASHBOARDS:
        render.draw(board, source, tmp_path / f"{board.uid}.png")
        assert (tmp_path / f"{board.uid}.png").stat().st_size > 50_000
