"""What the scheduler does so that requests continue from cached states (docs/caching.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import RequestStatus

from .prefixes import LEAST_GAIN, Marks, Prefixes
from .states import kind_of

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from .manager import ExpressManager


class Reuse:
    """States are made where they pay: at a request's end and when it is preempted, without a copy;
    at its prompt's end and where prompts part, with one.

    `requests` are the scheduler's, by id.
    """

    def __init__(self, manager: ExpressManager, requests: Mapping[str, Request]) -> None:
        self._manager, self._requests = manager, requests
        self._prefixes = Prefixes()
        self._marks: dict[str, Marks] = {}

    def arrived(self, request: Request) -> None:
        """Compare the prompt with those before it."""
        name, size, prompt = request.request_id, self._manager.block_size, request.num_prompt_tokens
        if self._manager.shared(name):
            return
        kind = kind_of(self._manager.budgets[name])
        hashes = request.block_hashes[: prompt // size]
        marks = self._marks[name] = Marks({prompt})
        count, other = self._prefixes.shared(kind, hashes)
        wanted = min(count, (prompt - 1) // size) * size
        known = 0
        if wanted >= LEAST_GAIN:
            marks.add(wanted)
            if self._computes(other, wanted):
                marks.maker, marks.wanted = other, self._marks[other].add(wanted)
                known = count
        self._prefixes.add(kind, hashes[known:], name)

    def _computes(self, name: str, tokens: int) -> bool:
        """Whether a request has yet to come to `tokens`."""
        request = self._requests.get(name)
        return request is not None and name in self._marks and request.num_computed_tokens < tokens

    def left(self, request: Request) -> None:
        self._marks.pop(request.request_id, None)

    def step_starts(self, running: Iterable[Request]) -> None:
        """Copy the states of running requests that have come to a mark."""
        running = list(running)
        self._manager.states.new_step()
        for request in running:
            marks = self._marks.get(request.request_id)
            if marks and marks.due and marks.passed(request.num_computed_tokens):
                self._manager.snapshot(request, len(running))

    def find(self, request: Request) -> tuple[list[KVCacheBlock], int]:
        """Blocks and tokens that a request starts from."""
        hit = self._manager.find(request)
        if marks := self._marks.get(request.request_id):
            marks.last = hit.tokens if hit else 0
        return (hit.source, hit.tokens) if hit else ([], 0)

    def waits(self, request: Request, found: int) -> bool:
        """Whether a request that was just looked for, and would start after `found` tokens, had
        better wait: another one computes what it needs, or this step has copied enough."""
        if self._manager.soon == request.request_id or (found and self._manager.copies_full):
            return True
        marks = self._marks.get(request.request_id)
        if marks is None or marks.wanted - found < LEAST_GAIN:
            return False
        maker = self._requests.get(marks.maker)
        return (
            maker is not None
            and maker.status == RequestStatus.RUNNING
            and self._computes(marks.maker, marks.wanted)
            and marks.wanted in self._marks[marks.maker].due
        )

    def clip(self, request: Request, computed: int, new: int) -> int:
        """How many of `new` tokens to compute so that the step ends at a mark."""
        marks = self._marks.get(request.request_id)
        mark = marks.next(computed) if marks and marks.due else None
        return new if mark is None else min(new, mark - computed)
