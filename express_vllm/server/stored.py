"""`/v1/responses` keeps its answers, and may work in the background: usage and refusals there.

`usage.express` is put into the answer itself, the one object that vLLM sends, stores and puts into
the final event: it lives as long as vLLM keeps that, and nothing more is kept.
"""

from __future__ import annotations

import asyncio
import functools
import json
from typing import Any

from ..edge import current
from .watch import Call


class Responses:
    """Over vLLM's handler of `/v1/responses`."""

    def __init__(self, serving: Any) -> None:
        self.serving = serving
        generate = serving.responses_full_generator

        @functools.wraps(generate)
        async def with_usage(*args: Any, **kwargs: Any) -> Any:
            response = await generate(*args, **kwargs)
            call, used = current.get(), getattr(response, "usage", None)
            if used is not None and isinstance(call, Call):
                used.express = call.usage()  # vLLM's model of usage allows more fields
            return response

        serving.responses_full_generator = with_usage

    async def begun(self, response: Any, call: Call) -> None:
        """Return when the engine has been asked for what vLLM does in the background."""
        task = self.serving.background_tasks.get(json.loads(bytes(response.body)).get("id"))
        if task is None:  # it has ended, or it never was in the background
            return
        asked = asyncio.ensure_future(call.asked.wait())
        await asyncio.wait({asked, task}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()

    def forget(self, call: Call) -> None:
        """Drop vLLM's record of an answer that was refused, which would stay queued for ever."""
        for request_id in call.refused:
            name = request_id.rpartition("_")[0]  # vLLM counts the requests of an answer
            if task := self.serving.background_tasks.get(name):
                task.add_done_callback(lambda task: task.cancelled() or task.exception())
            for store in ("response_store", "msg_store", "event_store"):
                getattr(self.serving, store).pop(name, None)
