"""Write the dashboards' JSON: python deploy/grafana/generate.py

The same bytes every time; a test keeps dashboards/ equal to what this writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from panels import DASHBOARDS, Dashboard, Panel

FOLDER = Path(__file__).resolve().parent / "dashboards"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, STAT_HEIGHT, HEIGHT = 24, 4, 8


def files() -> dict[Path, str]:
    """Path -> content of every dashboard."""
    return {
        FOLDER / f"{board.uid}.json": json.dumps(grafana(board), indent=2) + "\n"
        for board in DASHBOARDS
    }


def grafana(board: Dashboard) -> dict[str, Any]:
    return {
        "uid": board.uid,
        "title": board.title,
        "description": board.about,
        "tags": list(board.tags),
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [
            {
                "type": "dashboards",
                "title": "Express",
                "tags": ["express"],
                "asDropdown": False,
                "includeVars": True,
                "keepTime": True,
            }
        ],
        "templating": {"list": variables()},
        "panels": list(placed(board)),
    }


def variables() -> list[dict[str, Any]]:
    def label(name: str, text: str, metric: str) -> dict[str, Any]:
        query = f"label_values({metric}, {name})"
        return {
            "type": "query",
            "name": "model" if name == "model_name" else name,
            "label": text,
            "datasource": SOURCE,
            "definition": query,
            "query": {"query": query, "refId": "variable"},
            "refresh": 2,
            "sort": 1,
            "includeAll": True,
            "allValue": ".*",
            "multi": True,
            "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        }

    source = {"type": "datasource", "name": "datasource", "label": "Source", "query": "prometheus"}
    running = "vllm:num_requests_running"
    return [
        source,
        label("model_name", "Model", running),
        label("instance", "Server", f'{running}{{model_name=~"$model"}}'),
    ]


def placed(board: Dashboard) -> Iterator[dict[str, Any]]:
    """The rows and panels with their ids and places on the grid."""
    number, y = 1, 0
    for title, panels in board.rows:
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
            "panels": [],
        }
        number, y, x = number + 1, y + 1, 0
        for panel in panels:
            height = STAT_HEIGHT if panel.kind == "stat" else HEIGHT
            if x + panel.width > WIDTH:
                x, y = 0, y + height
            yield {"id": number} | drawn(panel, {"x": x, "y": y, "w": panel.width, "h": height})
            number, x = number + 1, x + panel.width
        y += height


def drawn(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"value": None, "color": "green"}]
    steps += [{"value": value, "color": colour} for value, colour in panel.thresholds]
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "min": 0,
        "thresholds": {"mode": "absolute", "steps": steps},
    }
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    if panel.kind == "stat":
        defaults["color"] = {"mode": "thresholds"}
        options: dict[str, Any] = {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "value",
            "graphMode": "area",
        }
    else:
        defaults["custom"] = {
            "drawStyle": "line",
            "lineWidth": 2,
            "fillOpacity": 20 if panel.stack else 0,
            "showPoints": "never",
            "spanNulls": 120_000,
            "stacking": {"mode": "normal" if panel.stack else "none", "group": "A"},
            "thresholdsStyle": {"mode": "line" if panel.thresholds else "off"},
        }
        options = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": SOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
                "range": True,
            }
            for index, query in enumerate(panel.queries)
        ],
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for path, content in files().items():
        path.write_text(content)
        print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    main()
