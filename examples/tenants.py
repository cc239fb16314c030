"""Budgets by tenant: a gateway that gives each API key its own memory, whatever the request says.

    make serve
    .venv/bin/python examples/tenants.py            # --url http://localhost:8000 --port 9000

Clients then talk to port 9000 with the key of their tenant.  Keep the server's own port closed to
them: it lets every request name its budget.
"""

from __future__ import annotations

import argparse
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.background import BackgroundTask

#: API key -> what a request of this tenant may use (docs/budgets.md).
BUDGETS: dict[str, dict[str, Any]] = {
    "key-of-a-small-tenant": {"memory_tokens": 256},
    "key-of-a-large-tenant": {"memory_tokens": 1024, "profile": "even"},
}


def with_budget(body: dict[str, Any], budget: dict[str, Any]) -> dict[str, Any]:
    """The body with the tenant's budget instead of any that it names, in either spelling."""
    xargs = body.get("vllm_xargs") or {}
    others = {name: value for name, value in xargs.items() if not name.startswith("express_")}
    return {**body, "vllm_xargs": others, "express": budget}


def gateway(url: str) -> FastAPI:
    """Forwards completions and chats to the server at `url`."""
    app = FastAPI()
    server = httpx.AsyncClient(base_url=url, timeout=None)

    @app.post("/v1/completions")
    @app.post("/v1/chat/completions")
    async def forward(request: Request) -> Response:
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key not in BUDGETS:
            return JSONResponse({"error": {"message": "unknown API key"}}, 401)
        body = with_budget(await request.json(), BUDGETS[key])
        sent = server.build_request("POST", request.url.path, json=body)
        answer = await server.send(sent, stream=True)
        return StreamingResponse(
            answer.aiter_bytes(), answer.status_code,
            media_type=answer.headers["content-type"], background=BackgroundTask(answer.aclose),
        )  # fmt: skip

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://localhost:8000", help="the server")
    parser.add_argument("--port", type=int, default=9000)
    options = parser.parse_args()
    uvicorn.run(gateway(options.url), host="127.0.0.1", port=options.port)


if __name__ == "__main__":
    main()
