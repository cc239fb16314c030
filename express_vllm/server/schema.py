"""The `express` object in the served OpenAPI schema, on every route that takes it."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from ..fields import Fields

REFERENCE = "#/components/schemas/"


def show_budgets(app: FastAPI, paths: list[str], fields: type[Fields]) -> None:
    """Extend `app.openapi()` as FastAPI documents it; vLLM's own models stay as they are."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            add_budgets(original(), paths, fields)  # the original keeps what it returns
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi_schema = None
    app.openapi = openapi  # type: ignore[method-assign]


def add_budgets(schema: dict[str, Any], paths: list[str], fields: type[Fields]) -> None:
    """Give the routes a body with `express`, whose limits are those of `fields`."""
    models = schema.setdefault("components", {}).setdefault("schemas", {})
    models.setdefault(fields.__name__, fields.model_json_schema())
    express = {
        "anyOf": [{"$ref": REFERENCE + fields.__name__}, {"type": "null"}],
        "title": "Express",
        "description": "what the request's KV cache may use (docs/api.md)",
    }
    for path in paths:
        content = schema["paths"].get(path, {}).get("post", {}).get("requestBody", {})
        body = content.get("content", {}).get("application/json", {}).get("schema", {})
        name = body.get("$ref", "").removeprefix(REFERENCE)
        if not name:  # a route that reads its body itself
            continue
        model = models[name]
        models["Express" + name] = {
            **model, "properties": {**model["properties"], "express": express}
        }  # fmt: skip
        body["$ref"] = REFERENCE + "Express" + name
