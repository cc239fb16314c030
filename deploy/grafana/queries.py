"""Refuses a query for a metric or label that the server does not export.

    python deploy/grafana/queries.py http://localhost:8000/metrics

A name that was mistyped, or that vLLM renamed, gives an empty panel or an alert that never fires,
and nobody notices.  `exported` reads the names and labels from the text of /metrics; `problems`
compares them with every query of the dashboards and of the rule files.  The tests do both against
the metrics that vLLM and express register and against a real server.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

DEPLOY = Path(__file__).resolve().parent.parent
DASHBOARDS = DEPLOY / "grafana" / "dashboards"
RULES = (DEPLOY / "prometheus" / "recording.yml", DEPLOY / "prometheus" / "alerts.yml")

#: Grafana's variables, in a form that Prometheus parses; `render.py` fills in other windows.
VARIABLES = {"$__rate_interval": "5m", "$model": ".*", "$instance": ".*"}
#: Labels that Prometheus and its histograms add.
ADDED = {"job", "instance", "__name__", "le"}


class Use(NamedTuple):
    """A metric in a query: where, its name and the labels that are matched or grouped by."""

    where: str
    name: str
    labels: frozenset[str]


def exported(text: str) -> dict[str, set[str]]:
    """Series name -> label names, from the text of /metrics; `up` is Prometheus's own."""
    found: dict[str, set[str]] = {"up": set()}
    for line in text.splitlines():
        match = re.match(r"([\w:]+)(?:\{(.*)\})? ", line)
        if match and not line.startswith("#"):
            found.setdefault(match[1], set()).update(re.findall(r'(\w+)="', match[2] or ""))
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


def problems(known: dict[str, set[str]], queries: Iterable[tuple[str, str]]) -> list[str]:
    """What is queried and not exported: metrics, and labels of metrics."""
    rules = recorded()
    wrong = []
    for where, expression in queries:
        for use in uses(where, expression):
            if use.name in rules:
                continue
            if use.name not in known:
                wrong.append(f"{where}: the server does not export {use.name}")
                continue
            for label in sorted(use.labels - known[use.name] - ADDED):
                wrong.append(f"{where}: {use.name} has no label {label}")
    return list(dict.fromkeys(wrong))


def main() -> None:
    import httpx

    wrong = problems(exported(httpx.get(sys.argv[1]).raise_for_status().text), expressions())
    print("\n".join(wrong) or "every query is answered by this server's metrics")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
