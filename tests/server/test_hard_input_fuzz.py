"""schemathesis against the served OpenAPI schema: our routes, and the budgets of the completions.

Of the completion routes' own fields those that are generated are the model, the prompt, the length,
streaming and both ways to name a budget; the rest is vLLM's, and fuzzing it finds vLLM's bugs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engines import SUPPORT
from serving import wait_for_rest

pytestmark = [pytest.mark.server, pytest.mark.ops]

OWN = ("/v1/express/config", "/v1/express/status", "/v1/express/plan", "/express")
SHORT_TEXT = {"type": "string", "maxLength": 200}
LENGTH = {"type": "integer", "minimum": 1, "maximum": 3}
MESSAGES = {
    "type": "array", "minItems": 1, "maxItems": 2,
    "items": {
        "type": "object", "required": ["role", "content"],
        "properties": {"role": {"enum": ["user", "system"]}, "content": SHORT_TEXT},
        "additionalProperties": False,
    },
}  # fmt: skip
#: Route -> its fields that are generated besides `express`, `vllm_xargs` and `stream`.
COMPLETIONS = {
    "/v1/completions": {"prompt": SHORT_TEXT, "max_tokens": LENGTH},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": LENGTH},
    "/v1/responses": {"input": SHORT_TEXT, "max_output_tokens": LENGTH},
}


def narrowed(schema):
    """The served schema with our routes, and the completion routes with fewer fields."""
    parts = schema["components"]["schemas"]
    paths = {path: schema["paths"][path] for path in (*OWN, *COMPLETIONS)}
    for path, fields in COMPLETIONS.items():
        body = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        model = parts[body["$ref"].rsplit("/", 1)[1]]
        kept = {n: model["properties"][n] for n in ("express", "vllm_xargs", "stream")}
        model["properties"] = {"model": {"const": "small"}, **fields, **kept}
        model["required"] = ["model", *fields]
        model["additionalProperties"] = False
    return {**schema, "paths": paths}


def test_no_server_error_is_found(server, tmp_path):
    schema = narrowed(server.client.get("/openapi.json").json())
    source = tmp_path / "openapi.json"
    source.write_text(json.dumps(schema))
    report = tmp_path / "report.json"
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "run", str(source),
        "--url", server.url, "--checks", "not_a_server_error", "--max-examples", "60",
        "--phases", "examples,coverage,fuzzing", "--seed", "20", "--request-timeout", "120",
        "--generation-database", "none", "--suppress-health-check", "all", "--no-color",
        "--warnings", "off", "--continue-on-failure", "--report-json-path", str(report),
    ]  # fmt: skip
    environment = {
        **os.environ, "COLUMNS": "200", "SCHEMATHESIS_HOOKS": "fuzz_hooks",
        "PYTHONPATH": str(SUPPORT),
    }  # fmt: skip
    done = subprocess.run(command, text=True, capture_output=True, cwd=tmp_path, env=environment)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    for path in (*OWN, *COMPLETIONS):
        assert path in schema["paths"]
    wait_for_rest(server)
    answer = server.client.post(
        "/v1/completions", json={"model": "small", "prompt": "Hi", "max_tokens": 1, "express": {}}
    )
    assert answer.status_code == 200
