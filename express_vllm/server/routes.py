"""The routes: vLLM's three completion routes with an `express` object, and express's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from importlib import import_module
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import create_model
from starlette.exceptions import HTTPException  # what FastAPI raises; its own is a subclass

from ..fields import BudgetError
from .answer import with_usage
from .body import PREFIX, check_duplicates, express_field, merge
from .errors import refused
from .page import HEADERS, PAGE
from .plan import Plan
from .service import Service
from .settle import settled
from .watch import Call, current_call

#: Route -> where vLLM's request model and handler are.
COMPLETIONS = {
    "/v1/completions": (
        "vllm.entrypoints.openai.completion", "CompletionRequest", "create_completion",
    ),
    "/v1/chat/completions": (
        "vllm.entrypoints.openai.chat_completion", "ChatCompletionRequest",
        "create_chat_completion",
    ),
    "/v1/responses": (
        "vllm.entrypoints.openai.responses", "ResponsesRequest", "create_responses",
    ),
}  # fmt: skip


class ExpressRoute(APIRoute):
    """A route that answers unreadable bodies (too deep, too many digits) in OpenAI's form too."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except HTTPException as error:
                answer = create_error_response(
                    f"{error.detail}: it must be a JSON object that Python can read",
                    status_code=HTTPStatus(error.status_code),
                )
                return JSONResponse(answer.model_dump(), error.status_code)

        return handle


def attach(app: FastAPI) -> None:
    """Add the routes to vLLM's application; its other routes stay as they are."""
    service = Service(app.state)
    old = {route.path: route for route in app.routes if isinstance(route, APIRoute)}
    before = len(app.router.routes)
    for path, (package, request, handler) in COMPLETIONS.items():
        if path in old:
            _add_completion(app, service, path, old[path], (package, request, handler))
    _add_own(app, service)
    routes = app.router.routes
    ours = routes[before:]
    replaced = {(route.path, "POST") for route in ours if isinstance(route, APIRoute)}
    # Ours come first: routes are tried in order, and a mount may match any path.
    routes[:] = ours + [r for r in routes[:before] if not _is_one_of(r, replaced)]
    app.openapi_schema = None


def _is_one_of(route: Any, replaced: set[tuple[str, str]]) -> bool:
    return isinstance(route, APIRoute) and any(
        (route.path, method) in replaced for method in route.methods
    )


def _add_completion(
    app: FastAPI, service: Service, path: str, old: APIRoute, source: tuple[str, str, str]
) -> None:
    package, request_name, handler_name = source
    base = getattr(import_module(f"{package}.protocol"), request_name)
    handler = getattr(import_module(f"{package}.api_router"), handler_name)
    model = create_model(
        f"Express{request_name}", __base__=base, express=express_field(service.fields)
    )

    async def endpoint(request: Any, raw_request: Request) -> Any:
        return await _answer(service, path, handler, request, raw_request)

    endpoint.__annotations__ = {"request": model, "raw_request": Request}
    endpoint.__name__, endpoint.__doc__ = handler.__name__, handler.__doc__
    app.router.add_api_route(
        path, endpoint, methods=["POST"], responses=old.responses, dependencies=old.dependencies,
        response_model=None, route_class_override=ExpressRoute,
    )  # fmt: skip


async def _answer(
    service: Service, path: str, handler: Any, request: Any, raw_request: Request
) -> Any:
    call = Call(path)
    if request.express is not None:
        call.prefix = PREFIX
        try:
            check_duplicates(await raw_request.body())
            if getattr(request, "use_beam_search", False):
                service.refuse_beam_search(request.express)
            request.vllm_xargs = merge(request.express, request.vllm_xargs, service.fields)
        except BudgetError as error:
            raise refused(error) from error
    # Never reset: a stream asks for its output later, and every request has a context of its own.
    current_call.set(call)
    try:
        response = await handler(request, raw_request)
        if isinstance(response, StreamingResponse) and not call.asked.is_set():
            response.body_iterator = await settled(aiter(response.body_iterator), call.asked)
    except BaseException:
        service.finish(call)
        raise
    return with_usage(response, call.usage, functools.partial(service.finish, call))


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
    json_only = [Depends(validate_json_request)]
    add = functools.partial(app.router.add_api_route, route_class_override=ExpressRoute)
    add("/v1/express/config", config, methods=["GET"])
    add("/v1/express/status", status, methods=["GET"])
    add(
        "/v1/express/plan", plan, methods=["POST"], response_model=Plan, responses=errors,
        dependencies=json_only,
    )  # fmt: skip
    add("/express", page, methods=["GET"], response_class=HTMLResponse)
