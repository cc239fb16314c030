"""Holds an answer back until the engine has taken its requests, so that a refusal is still a 400.

vLLM starts its streams before the engine is asked, and turns what is raised in them into events.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from .watch import Call


async def settled(chunks: AsyncIterator[Any], call: Call) -> AsyncIterator[Any]:
    """The same chunks, once the call's requests are admitted or the stream has ended.

    Raises what kept the engine from being asked, or what the stream raises before that.
    """
    early: list[Any] = []
    pending: asyncio.Future[Any] | None = None
    waiting = asyncio.ensure_future(call.asked.wait())
    try:
        while not call.asked.is_set():
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
    if call.error is not None:
        await _close(chunks, pending)
        raise call.error
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
        await _close(chunks, pending)


async def _close(chunks: AsyncIterator[Any], pending: asyncio.Future[Any] | None) -> None:
    await _drop(pending)
    if hasattr(chunks, "aclose"):
        await chunks.aclose()


async def _drop(pending: asyncio.Future[Any] | None) -> None:
    """Cancel a step that is still running and wait for its clean-up."""
    if pending is not None and not pending.done():
        pending.cancel()
        with suppress(asyncio.CancelledError, StopAsyncIteration):
            await pending
