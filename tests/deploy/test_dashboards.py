"""Dashboards, rules and alerts: generated, valid, and asking only for what the server exports."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
sys.path.insert(0, str(DEPLOY / "grafana"))

import generate  # noqa: E402
import queries  # noqa: E402
from panels import DASHBOARDS, Panel  # noqa: E402

PROMETHEUS = DEPLOY / "prometheus"
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is missing: apt install prometheus"
)


def registered(model_path):
    """The metrics that vLLM's and express's loggers register, as text, without a server."""
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, generate_latest
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.metrics.loggers import PrometheusStatLogger
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    from express_vllm.server.metrics import ExpressStatLogger

    config = EngineArgs(model=str(model_path), max_model_len=2048).create_engine_config()
    try:
        PrometheusStatLogger(config, [0])
        ExpressStatLogger(config, [0])
        text = generate_latest(REGISTRY).decode()
    finally:
        unregister_vllm_metrics()
    # vLLM's HTTP server adds this one, through prometheus_fastapi_instrumentator.
    http = CollectorRegistry()
    labels = {"method": "GET", "status": "2xx", "handler": "/"}
    Counter("http_requests", "requests", list(labels), registry=http).labels(**labels)
    return text + generate_latest(http).decode()


@pytest.fixture(scope="module")
def known(model_path):
    return queries.exported(registered(model_path))


def test_the_committed_dashboards_are_what_the_script_writes():
    for path, content in generate.files().items():
        assert path.read_text() == content, "run: python deploy/grafana/generate.py"
    assert set(generate.FOLDER.iterdir()) == set(generate.files())


def test_every_query_is_about_something_that_the_server_exports(known):
    found = list(queries.expressions())
    assert len(found) > 60
    assert queries.problems(known, found) == []


def test_every_express_metric_is_on_a_dashboard(known):
    asked = {use.name for where, text in queries.expressions() for use in queries.uses(where, text)}
    bases = {name for name in known if name.startswith("vllm:express_")}
    bases = {name.removesuffix("_bucket") for name in bases if not name.endswith("_created")}
    for base in {name for name in bases if not name.endswith(("_sum", "_count"))}:
        assert {base, f"{base}_bucket", f"{base}_sum"} & asked, f"nothing shows {base}"


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("rate(vllm:express_compaction_total[5m])", "not export vllm:express_compaction_total"),
        ("vllm:gpu_cache_usage_perc", "does not export vllm:gpu_cache_usage_perc"),
        (
            'vllm:express_held_kv_tokens{modell="x"}',
            "has no label modell",
        ),
        ("sum by (reason) (vllm:express_requests_total)", "has no label reason"),
        ("express:held_kv_tokens:median", "does not export express:held_kv_tokens:median"),
    ],
)
def test_a_wrong_query_is_refused(known, query, words):
    assert words in "\n".join(queries.problems(known, [("panel", query)]))


def test_a_query_that_is_not_promql_is_refused(known):
    with pytest.raises(ValueError, match="parenthesis"):
        queries.problems(known, [("panel", "sum by (model_name (up)")])


def test_panels_do_not_overlap_and_fill_the_width():
    for board in DASHBOARDS:
        taken = set()
        for panel in generate.grafana(board)["panels"]:
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= generate.WIDTH
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & taken, panel["title"]
            taken |= cells
        assert len(taken) == generate.WIDTH * (1 + max(y for _, y in taken)), board.title


def test_titles_and_ids_are_unique():
    for path in queries.DASHBOARDS.glob("*.json"):
        board = json.loads(path.read_text())
        assert board["uid"] == path.stem
        for key in ("id", "title"):
            values = [panel[key] for panel in board["panels"]]
            assert len(values) == len(set(values)), f"{path.name}: {key}"
        assert all(p["description"] for p in board["panels"] if p["type"] != "row")


def test_render_splits_rows_as_grafana_does():
    from render import legend, split

    panels = tuple(Panel(str(n), "", (), width=w) for n, w in enumerate((8, 8, 8, 12, 12)))
    assert [len(line) for _, line in split("row", panels)] == [3, 2]
    assert legend("{{mode}} of {{engine}}", {"mode": "exact", "engine": "0"}) == "exact of 0"


def test_alerts_say_what_to_do_and_operations_explains_them():
    page = (DEPLOY.parent / "docs" / "operations.md").read_text()
    for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("info", "warning", "critical")
            assert {"summary", "description"} <= set(rule["annotations"])
            assert f"`{rule['alert']}`" in page, f"docs/operations.md does not explain {rule}"


def test_the_scrape_job_is_the_one_that_the_rules_select():
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    job = config["scrape_configs"][0]["job_name"]
    assert config["rule_files"] == ["recording.yml", "alerts.yml"]
    for where, text in queries.expressions():
        assert 'job="' not in text or f'job="{job}"' in text, where


@needs_promtool
@pytest.mark.parametrize(
    "command", [["check", "config", "prometheus.yml"], ["test", "rules", "tests.yml"]]
)
def test_promtool_accepts(command):
    done = subprocess.run(["promtool", *command], cwd=PROMETHEUS, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_every_alert_is_tested():
    tested = (PROMETHEUS / "tests.yml").read_text()
    for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["alert"] in tested, f"tests.yml does not fire {rule['alert']}"


@needs_promtool
def test_promtool_notices_a_broken_rule(tmp_path):
    """A guard for the guards: a threshold that was moved fails the unit tests."""
    shutil.copytree(PROMETHEUS, tmp_path, dirs_exist_ok=True)
    alerts = tmp_path / "alerts.yml"
    alerts.write_text(alerts.read_text().replace("share_rate5m > 0.3", "share_rate5m > 0.7"))
    done = subprocess.run(
        ["promtool", "test", "rules", "tests.yml"], cwd=tmp_path, text=True, capture_output=True
    )
    assert done.returncode != 0, "the test of ExpressCompactionTimeShare is blind"
