"""`vllm run-batch` reads bodies without HTTP: budgets, refusals and usage for its lines too."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from ..edge import current
from ..fields import BudgetError
from ..settings import Settings, chosen
from .body import budget, refuse_beam_search
from .errors import refused
from .watch import Call, watch


async def answer(settings: Settings, handle: Callable[[Any], Awaitable[Any]], request: Any) -> Any:
    """vLLM's answer to a line's request, under the budget that it names, with usage.

    Raises vLLM's validation error, which becomes the line's status 400.
    """
    body = {**request.model_dump(include={"vllm_xargs", "use_beam_search"}),
            **(request.model_extra or {})}  # fmt: skip
    try:
        refuse_beam_search(body)
        prefix, fields = budget(body, settings.fields)
    except BudgetError as error:
        raise refused(error) from error
    call = Call("run-batch", settings.size, prefix, fields)
    current.set(call)  # every line runs in a context of its own
    response = await handle(request)
    if call.error is not None:
        raise call.error
    if (used := getattr(response, "usage", None)) is not None:
        used.express = call.usage()  # vLLM's model of usage allows more fields
    return response


def budgets_in(run_request: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's `run_request(handler, request, tracker)` with budgets, where express runs."""

    async def wrapped(handle: Any, request: Any, tracker: Any) -> Any:
        engine = getattr(getattr(handle, "__self__", None), "engine_client", None)
        if (settings := settings_of(engine)) is None:
            return await run_request(handle, request, tracker)

        async def within(body: Any) -> Any:
            return await answer(settings, handle, body)

        return await run_request(within, request, tracker)

    return wrapped


def settings_of(engine: Any) -> Settings | None:
    """The settings of an engine client, which is watched from then on; None without express."""
    if engine is None or not chosen(engine.vllm_config):
        return None
    if not hasattr(engine, "express_watched"):
        engine.express_watched = True
        watch(engine)
    return Settings.of(engine.vllm_config)
