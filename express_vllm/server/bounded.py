"""Keeps error answers small, whatever vLLM or pydantic repeat of a body in them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import Message, Send

#: The most bytes of an error answer.
LONGEST = 1000
#: How much of every text in it is kept, the first that is short enough.
CUTS = (600, 300, 150, 70, 20)


class BoundedErrors:
    """An ASGI `send` that shortens the bodies of answers with status 400 or more."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self._start = message
        elif self._start is None or message["type"] != "http.response.body":
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._answer(self._start)

    async def _answer(self, start: Message) -> None:
        body = shorten(self._body)
        headers = [(k, v) for k, v in start["headers"] if k.lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def shorten(body: bytes) -> bytes:
    """The body within LONGEST bytes: JSON with its texts cut, other text cut."""
    if len(body) <= LONGEST:
        return body
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return body[:LONGEST]
    for most in CUTS:
        short = json.dumps(cut(content, most), ensure_ascii=False, separators=(",", ":"))
        if len(encoded := short.encode("utf-8", "replace")) <= LONGEST:
            return encoded
    return b'{"error":{"message":"the error is too long to be sent","type":"error"}}'


def cut(content: Any, most: int) -> Any:
    """The same JSON value with every text in it cut to `most` characters."""
    if isinstance(content, str):
        return content if len(content) <= most else content[:most] + "..."
    if isinstance(content, dict):
        return {key: cut(value, most) for key, value in content.items()}
    if isinstance(content, list):
        return [cut(value, most) for value in content]
    return content
