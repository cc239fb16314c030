"""Follows requests between the HTTP routes and the engine: budgets, lengths, what was used.

A route sets the current `Call`; vLLM's handlers ask the engine client for output within it.  The
client they hold is `WatchedEngine`, which resolves the budget before the first byte is answered and
counts the tokens of every sequence, however many of them a call has.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from ..budget import Budget, BudgetError
from ..fields import PREFIX
from .errors import refused
from .usage import Sequence, usage

#: How many calls the page shows.
RECENT = 50
_numbers = itertools.count(1)


@dataclass
class Call:
    """One HTTP request: where it came in, how its fields are spelled, and its sequences."""

    route: str
    prefix: str = PREFIX
    number: int = field(default_factory=lambda: next(_numbers))
    started: float = field(default_factory=time.time)
    finished: float | None = None
    sequences: list[Sequence] = field(default_factory=list)
    #: Set when the engine has been asked, and has not refused.
    asked: asyncio.Event = field(default_factory=asyncio.Event)

    def usage(self) -> dict[str, Any] | None:
        return usage(self.sequences) if self.sequences else None

    def row(self) -> dict[str, Any]:
        """What the page shows; never what was asked or answered."""
        return {
            "number": self.number, "route": self.route, "started": self.started,
            "seconds": (self.finished or time.time()) - self.started,
            "running": self.finished is None,
            "prompt_tokens": sum(s.prompt for s in self.sequences),
            "output_tokens": sum(s.output for s in self.sequences),
            "usage": self.usage(),
        }  # fmt: skip


current_call: ContextVar[Call | None] = ContextVar("express_call", default=None)


class WatchedEngine:
    """vLLM's engine client with `generate` watched; everything else is its own."""

    def __init__(self, engine: Any, budget: Callable[[Any, int, str], Budget]) -> None:
        self._engine = engine
        self._budget = budget
        self.recent: deque[Call] = deque(maxlen=RECENT)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        output = self._engine.generate(prompt, sampling_params, request_id, **kwargs)
        call, tokens = current_call.get(), prompt_tokens(prompt)
        if call is None:
            return output
        if tokens is None:
            call.asked.set()
            return output
        try:
            budget = self._budget(sampling_params, tokens, call.prefix)
        except BudgetError as error:
            raise refused(error) from error
        call.asked.set()
        if not call.sequences:
            self.recent.append(call)
        sequences = [Sequence(budget, tokens) for _ in range(sampling_params.n or 1)]
        call.sequences += sequences
        return _count(output, sequences, call, is_delta(sampling_params))


def prompt_tokens(prompt: Any) -> int | None:
    """The length of a rendered prompt; None if it has no token ids."""
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
    return None if ids is None else len(ids)


def is_delta(sampling_params: Any) -> bool:
    """Whether outputs hold only their new tokens."""
    return getattr(sampling_params.output_kind, "name", "") == "DELTA"


async def _count(
    output: AsyncGenerator[Any, None], sequences: list[Sequence], call: Call, delta: bool
) -> AsyncGenerator[Any, None]:
    try:
        async for result in output:
            for part in result.outputs:
                sequence = sequences[part.index]
                count = len(part.token_ids)
                sequence.output = sequence.output + count if delta else count
            yield result
    finally:
        await output.aclose()
        for sequence in sequences:
            sequence.done = True
        if all(sequence.done for sequence in call.sequences):
            call.finished = time.time()
