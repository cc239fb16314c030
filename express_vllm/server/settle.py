"""Holds a stream back until the engine has taken its request, so that a refusal is still a 400.

vLLM starts the streams of `/v1/responses` before it asks the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any


async def settled(chunks: AsyncIterator[Any], started: asyncio.Event) -> AsyncIterator[Any]:
    """The same chunks, once `started` is set or the stream has ended.

    Raises what the stream raises before that.
    """
    early: list[Any] = []
    pending: asyncio.Future[Any] | None = None
    waiting = asyncio.ensure_future(started.wait())
    try:
        while not started.is_set():
            pending = asyncio.ensure_future(anext(chunks))
            await asyncio.wait({pending, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if not pending.done():
                break
            early.append(pending.result())
            pending = None
    except StopAsyncIteration:
        pending = None
    except asyncio.CancelledError:
        await _drop(pending)
        raise
    finally:
        waiting.cancel()
    return _replay(early, pending, chunks)


async def _replay(
    early: list[Any], pending: asyncio.Future[Any] | None, chunks: AsyncIterator[Any]
) -> AsyncIterator[Any]:
    try:
        for chunk in early:
            yield chunk
        if pending is not None:
            with suppress(StopAsyncIteration):
                yield await pending
        async for chunk in chunks:
            yield chunk
    finally:
        await _drop(pending)
        if hasattr(chunks, "aclose"):
            await chunks.aclose()


async def _drop(pending: asyncio.Future[Any] | None) -> None:
    """Cancel a step that is still running and wait for its clean-up."""
    if pending is not None and not pending.done():
        pending.cancel()
        with suppress(asyncio.CancelledError, StopAsyncIteration):
            await pending
