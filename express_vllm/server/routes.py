"""The routes: vLLM's, which read budgets or refuse them (table.py), and express's own.

vLLM's routes stay as they are, with their models and handlers; what they are called with and what
they answer goes through `Take` or `Refuse`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, Response
from fastapi.routing import APIRoute, request_response

from ..fields import BudgetError
from .body import named
from .errors import refused
from .page import HEADERS, PAGE
from .plan import Plan
from .schema import show_budgets
from .service import Service
from .table import WITHOUT_BUDGET, Route, decision

Handler = Callable[[Request], Awaitable[Response]]
UNREADABLE = "the body cannot be read: it must be a JSON object that Python can read"


def attach(app: FastAPI) -> None:
    """Put budgets into vLLM's routes and add our own; whatever takes none stays as it is."""
    service = Service(app.state)
    taking = []
    for route in app.routes:
        if not isinstance(route, APIRoute) or "POST" not in route.methods:
            continue
        if route.path in WITHOUT_BUDGET:
            continue
        decided = decision(route.path)
        if not decided.express:
            taking.append(route)
        _wrap(route, functools.partial(_answer, service, decided))
    # Ours come first: routes are tried in order, and a mount may match any path.
    before = len(app.router.routes)
    _add_own(app, service)
    routes = app.router.routes
    routes[:] = routes[before:] + routes[:before]
    show_budgets(app, [route.path for route in taking], service.fields)


def _wrap(route: APIRoute, answer: Callable[[Request, Handler], Awaitable[Response]]) -> None:
    """Have the route's requests answered by `answer`, which gets its own handler too."""
    handler = route.get_route_handler()

    async def handle(request: Request) -> Response:
        return await answer(request, handler)

    route.app = request_response(handle)


async def read(request: Request) -> Any:
    """The body, if it is JSON or a form, else None; vLLM's handlers reuse what is read here.

    Broken JSON is None too: FastAPI says where it is broken.  Raises a 400 if Python cannot read it
    (nested too deep, a number of too many digits), where FastAPI's text does not say why.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        return await request.form()
    if kind != "application/json" and not kind.endswith("+json"):
        return None
    try:
        return await request.json()
    except json.JSONDecodeError:
        return None
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, UNREADABLE) from error


async def _answer(service: Service, route: Route, request: Request, handler: Handler) -> Response:
    """vLLM's answer to a request, under the budget that its body names, if the route takes one."""
    body = await read(request)
    try:
        for place, _, fields in named(body):
            if reason := route.refuses(place):
                raise BudgetError(place, fields, reason, "route")
        if route.express:
            return await handler(request)
        call = service.call(route, body, await request.body())
    except BudgetError as error:
        raise refused(error) from error
    return await service.answer(call, functools.partial(handler, request))


def _add_own(app: FastAPI, service: Service) -> None:
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse
    from vllm.entrypoints.serve.utils.api_utils import validate_json_request

    errors: dict[int | str, dict[str, Any]] = {400: {"model": ErrorResponse}}

    async def config() -> dict[str, Any]:
        """Defaults, limits, schedule, bytes per token and the engine's pool."""
        return service.describe()

    async def status() -> dict[str, Any]:
        """KV slots held now, and the last requests of this API server."""
        return service.status()

    async def plan(request: Any, raw_request: Request) -> Plan:
        """What a request would use; no model runs."""
        return service.plan(request, await raw_request.body())

    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE, headers=HEADERS)

    plan.__annotations__ = {
        "request": service.plan_request, "raw_request": Request, "return": Plan,
    }  # fmt: skip
    add = app.router.add_api_route
    add("/v1/express/config", config, methods=["GET"])
    add("/v1/express/status", status, methods=["GET"])
    add(
        "/v1/express/plan", plan, methods=["POST"], response_model=Plan, responses=errors,
        dependencies=[Depends(validate_json_request)],
    )  # fmt: skip
    add("/express", page, methods=["GET"], response_class=HTMLResponse)
    for route in app.router.routes:
        if isinstance(route, APIRoute) and route.path == "/v1/express/plan":
            _wrap(route, _readable)


async def _readable(request: Request, handler: Handler) -> Response:
    await read(request)
    return await handler(request)
