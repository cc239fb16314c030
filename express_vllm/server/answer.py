"""Puts `usage.express` into answers: one JSON object, or the events of a stream."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse

#: How usage that is not null looks in an event.
USAGE_MARKS = ('"usage":{', '"usage": {')

Usage = Callable[[], dict[str, Any] | None]


def with_usage(response: Any, usage: Usage, done: Callable[[], None]) -> Any:
    """The response with `usage()` in its usage; `done` is called when it has been sent."""
    if isinstance(response, StreamingResponse):
        response.body_iterator = _stream(response.body_iterator, usage, done)
        return response
    done()
    if not isinstance(response, JSONResponse) or response.status_code != 200:
        return response
    content = json.loads(bytes(response.body))
    if not insert(content, usage):
        return response
    return _replace(response, content)


def insert(content: Any, usage: Usage) -> bool:
    """Add `express` to the object's usage, if it has one without it; -> whether that was so."""
    if not isinstance(content, dict) or not isinstance(content.get("usage"), dict):
        return False
    if "express" in content["usage"] or (used := usage()) is None:
        return False
    content["usage"]["express"] = used
    return True


def last_usage(event: Any) -> Any:
    """The object of a stream's event that holds the whole call's usage; None in other events.

    That is the chunk, or the event of `/v1/messages`, with usage and no choices; the answers of
    `/v1/responses` have it already (stored.py).
    """
    if not isinstance(event, dict):
        return None
    return None if event.get("choices") else event


def _replace(response: JSONResponse, content: Any) -> Response:
    headers = {k: v for k, v in response.headers.items() if k.lower() != "content-length"}
    return JSONResponse(
        content, response.status_code, headers=headers, background=response.background
    )


async def _stream(
    chunks: Any, usage: Usage, done: Callable[[], None]
) -> AsyncIterator[str | bytes]:
    try:
        async for chunk in chunks:
            yield _event(chunk, usage)
    finally:
        done()
        if hasattr(chunks, "aclose"):
            await chunks.aclose()


def _event(chunk: Any, usage: Usage) -> Any:
    """One server-sent event; only those that hold usage are parsed."""
    if not isinstance(chunk, str) or not any(mark in chunk for mark in USAGE_MARKS):
        return chunk
    head, found, data = chunk.partition("data: ")
    if not found:
        return chunk
    try:
        event = json.loads(data)
    except ValueError:
        return chunk
    if not insert(last_usage(event), usage):
        return chunk
    return f"{head}data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"
