"""Follows a call between its route and the engine: which budgets it got, what it used.

A route sets the current `Call`; vLLM's handlers ask the engine client for output within it, and the
edge tells it of every request that it admits.  The engine client's `generate` is watched: it hands
the call's budget to the engine and counts the tokens of every sequence, however many a call has.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from ..budget import Budget
from ..edge import current
from ..fields import PREFIX, BudgetError
from ..kvsize import KVSize
from .body import PINNED
from .errors import refused
from .usage import Sequence, usage

#: How many calls the page shows.
RECENT = 50
#: Attribute of a CompletionOutput: how many tokens its sequence started from (patches.py).
CACHED = "express_cached_tokens"
_numbers = itertools.count(1)


@dataclass
class Call:
    """One HTTP request, or one line of a batch: where it came in, its budget, its sequences.

    `fields` is the budget as `vllm_xargs`, `prefix` how the client spells them.
    """

    route: str
    size: KVSize
    prefix: str = PREFIX
    fields: dict[str, Any] = field(default_factory=dict)
    #: The calls that the page shows; this one joins them when the engine takes it.
    recent: deque[Call] = field(default_factory=lambda: deque(maxlen=RECENT), repr=False)
    number: int = field(default_factory=lambda: next(_numbers))
    started: float = field(default_factory=time.time)
    finished: float | None = None
    #: By the id of the engine's request.
    requests: dict[str, list[Sequence]] = field(default_factory=dict)
    #: Set when everything that was asked of the engine is admitted, or something is refused.
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    #: What was raised before the engine had the requests, the first time, and for which of them.
    error: Exception | None = None
    refused: list[str] = field(default_factory=list)
    #: Why the front of its prompt cannot be pinned, as `"pinned_tokens": "system"` asks.
    no_front: BudgetError | None = None
    _waiting: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        #: Whether the system messages are to be pinned; their tokens are counted later (front.py).
        self.pins_front = self.fields.get(PINNED) == "system"

    @property
    def sequences(self) -> list[Sequence]:
        return [sequence for sequences in self.requests.values() for sequence in sequences]

    def asks(self, request_id: str) -> None:
        """The engine will be asked for `request_id`."""
        self._waiting.add(request_id)

    def admitted(self, request_id: str, budget: Budget, prompt_tokens: int, count: int) -> None:
        """The edge lets `request_id` through: `count` sequences under one budget each."""
        if not self.requests:
            self.recent.append(self)
        self.requests[request_id] = [Sequence(budget, prompt_tokens) for _ in range(count)]
        self._waiting.discard(request_id)
        if not self._waiting:
            self.asked.set()

    def failed(self, request_id: str, error: Exception) -> None:
        """Asking for `request_id` raised `error`; what happens after it was admitted is vLLM's."""
        if request_id in self._waiting:
            self.error = self.error or error
            self.refused.append(request_id)
            self.asked.set()

    def finish(self) -> None:
        """The answer is complete."""
        self.finished = self.finished or time.time()

    def usage(self) -> dict[str, Any] | None:
        return usage(self.sequences, self.size) if self.requests else None

    def row(self) -> dict[str, Any]:
        """What the page shows; never what was asked or answered."""
        sequences = self.sequences
        return {
            "number": self.number, "route": self.route, "started": self.started,
            "seconds": (self.finished or time.time()) - self.started,
            "running": self.finished is None,
            "prompt_tokens": sum(s.prompt for s in sequences),
            "output_tokens": sum(s.output for s in sequences),
            "usage": self.usage(),
        }  # fmt: skip


def watch(engine_client: Any) -> None:
    """From now on follow what is asked of the engine within a `Call`."""
    generate = engine_client.generate

    @functools.wraps(generate)
    def watched(
        prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        call = current.get()
        if not isinstance(call, Call):
            return generate(prompt, sampling_params, request_id, **kwargs)
        call.asks(request_id)
        if call.fields:  # a copy: a handler may use the same parameters for several requests
            sampling_params = copy.copy(sampling_params)
            sampling_params.extra_args = {**(sampling_params.extra_args or {}), **call.fields}
        output = generate(prompt, sampling_params, request_id, **kwargs)
        return _followed(output, call, request_id, is_delta(sampling_params))

    engine_client.generate = watched


def is_delta(sampling_params: Any) -> bool:
    """Whether outputs hold only their new tokens."""
    return getattr(sampling_params.output_kind, "name", "") == "DELTA"


async def _followed(
    output: AsyncGenerator[Any, None], call: Call, request_id: str, delta: bool
) -> AsyncGenerator[Any, None]:
    """The same output, counted."""
    try:
        if call.no_front is not None:
            raise refused(call.no_front)
        async for result in output:
            if sequences := call.requests.get(request_id):
                for part in result.outputs:
                    sequence, count = sequences[part.index], len(part.token_ids)
                    sequence.output = sequence.output + count if delta else count
                    sequence.cached = getattr(part, CACHED)
            yield result
    except Exception as error:
        call.failed(request_id, error)
        raise
    finally:
        await output.aclose()
        for sequence in call.requests.get(request_id, ()):
            sequence.done = True
        if all(sequence.done for sequence in call.sequences):
            call.finish()
