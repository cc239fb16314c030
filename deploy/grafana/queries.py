"""Refuses a query for a metric or label that the server does not export.

A name that was mistyped, or that vLLM renamed, gives an empty panel or an alert that never fires,
and nobody notices.  `exported` knows the names from the sources of vLLM and of express, `scraped`
from a real /metrics; `problems` compares them with every query of the dashboards and rule files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

DEPLOY = Path(__file__).resolve().parent.parent
DASHBOARDS = DEPLOY / "grafana" / "dashboards"
RULES = (DEPLOY / "prometheus" / "recording.yml", DEPLOY / "prometheus" / "alerts.yml")

#: Grafana's variables, in the form that Prometheus parses; `render.py` fills in other windows.
VARIABLES = {"$__rate_interval": "5m", "$model": ".*", "$instance": ".*"}
#: From Prometheus itself, and from prometheus_fastapi_instrumentator, which vLLM installs.
ELSEWHERE = {"up", "http_requests_total"}
#: Labels that Prometheus adds to every series.
ADDED = {"job", "instance", "__name__"}
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


class Use(NamedTuple):
    """A metric in a query: where, its name and the labels that are matched or grouped by."""

    where: str
    name: str
    labels: frozenset[str]


def exported() -> set[str]:
    """Series names that the sources of vLLM's loggers and of express's metrics declare."""
    found = set(ELSEWHERE)
    for module in ("vllm.v1.metrics.loggers", "express_vllm.server.metrics"):
        for kind, name in declared(source(module)):
            base = name.removesuffix("_total") if kind == "counter" else name
            found |= {base + suffix for suffix in SUFFIXES[kind]}
    return found


def declared(text: str) -> Iterator[tuple[str, str]]:
    """(kind, name) of `Counter(name="vllm:x"`, `self._gauge_cls("vllm:y"` and their like."""
    call = re.compile(r'(counter|gauge|histogram)\w*\(\s*(?:name=)?"(vllm:\w+)"', re.IGNORECASE)
    for match in call.finditer(text):
        yield match[1].lower(), match[2]


def source(module: str) -> str:
    """A module's text, without importing it (vLLM takes seconds)."""
    spec = find_spec(module.split(".")[0])
    assert spec is not None, f"{module.split('.')[0]} is not installed"
    for folder in spec.submodule_search_locations or ():
        path = Path(folder, *module.split(".")[1:]).with_suffix(".py")
        if path.exists():
            return path.read_text()
    raise FileNotFoundError(module)


def scraped(text: str) -> dict[str, set[str]]:
    """Series name -> label names, from the text of /metrics."""
    found: dict[str, set[str]] = {"up": set()}
    for line in text.splitlines():
        match = re.match(r"([\w:]+)(?:\{(.*)\})? ", line)
        if match and not line.startswith("#"):
            labels = re.findall(r'(\w+)="', match[2] or "")
            found.setdefault(match[1], set()).update(labels)
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """(where, expression) of every dashboard target, recording rule and alert."""
    import yaml

    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                yield f"{path.name}: {panel['title']}", target["expr"]
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                yield f"{path.name}: {rule.get('record') or rule['alert']}", rule["expr"]


def recorded() -> set[str]:
    import yaml

    groups = yaml.safe_load(RULES[0].read_text())["groups"]
    return {rule["record"] for group in groups for rule in group["rules"]}


def substitute(expression: str, variables: dict[str, str] = VARIABLES) -> str:
    for name, value in variables.items():
        expression = expression.replace(name, value)
    return expression


def uses(where: str, expression: str) -> Iterator[Use]:
    """Every metric that an expression selects.  Raises ValueError if it is not PromQL."""
    import promql_parser

    found: list[Use] = []

    def collect(expression: Any, grouped: frozenset[str]) -> None:
        def visit(node: Any) -> bool:
            if isinstance(node, promql_parser.VectorSelector):
                matched = {matcher.name for matcher in node.matchers.matchers}
                found.append(Use(where, node.name or "", grouped | matched))
            return True

        promql_parser.walk(expression, visit)

    def aggregations(node: Any) -> bool:
        modifier = node.modifier if isinstance(node, promql_parser.AggregateExpr) else None
        if modifier and modifier.type == promql_parser.AggModifierType.By:
            collect(node.expr, frozenset(modifier.labels))
        return True

    tree = promql_parser.parse(substitute(expression))
    collect(tree, frozenset())
    promql_parser.walk(tree, aggregations)
    yield from found


def problems(
    known: Iterable[str],
    queries: Iterable[tuple[str, str]],
    labels: dict[str, set[str]] | None = None,
) -> list[str]:
    """What is queried and not exported; with `labels`, also labels that a metric does not have."""
    names = set(known) | recorded()
    wrong = []
    for where, expression in queries:
        for use in uses(where, expression):
            if use.name not in names:
                wrong.append(f"{where}: the server does not export {use.name}")
            elif labels and use.name in labels:
                for label in sorted(use.labels - labels[use.name] - ADDED):
                    wrong.append(f"{where}: {use.name} has no label {label}")
    return wrong
