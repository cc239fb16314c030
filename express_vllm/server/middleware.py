"""How express gets into vLLM's API server: a middleware that adds its routes at start-up.

vLLM loads endpoint plugins only when VLLM_PLUGINS names them.  A middleware needs no such setting:
the platform puts this one into the default of `--middleware` (a documented hook), so every API
server process has it.  It touches nothing unless `--attention-backend express` was given.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ..patches import budgets_in_batches, cut_messages_before_cleaning
from ..settings import chosen
from .bounded import BoundedErrors

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger("vllm.express")
PATH = "express_vllm.server.middleware.ExpressMiddleware"


def add_to(parser: Any) -> None:
    """Put the middleware into the default of `--middleware`, where the parser has that."""
    budgets_in_batches()  # vllm run-batch has the same parser, and no application
    for action in parser._actions:
        if action.dest == "middleware" and PATH not in (action.default or []):
            parser.set_defaults(middleware=[*(action.default or []), PATH])


class ExpressMiddleware:
    """Adds the routes when the server starts, and from then on keeps error answers small."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.attached = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            try:
                self._start(scope["app"])
            except Exception as error:  # else uvicorn would serve on, without our routes
                logger.exception("express: the request API cannot start")
                await receive()
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                raise
        if self.attached and scope["type"] == "http":
            send = BoundedErrors(send)
        await self.app(scope, receive, send)

    def _start(self, app: Any) -> None:
        config = getattr(app.state, "vllm_config", None)
        if config is None or getattr(app.state, "engine_client", None) is None:
            return  # a server without an engine
        if not chosen(config):
            return
        from .routes import attach  # FastAPI and vLLM's server: not where only arguments are read

        cut_messages_before_cleaning()
        attach(app)
        self.attached = True
        logger.info("express: request API at /v1/express, page at /express")
