"""What the engine did for its budgets, counted in the scheduler and sent to the API servers.

vLLM sends a `SchedulerStats` to one of its API servers after every step and has no place in it for
a plugin's numbers.  `attach` puts them, as JSON, into the *name* of an entry of the open dictionary
`num_kv_fetch_reqs_by_stage`, whose value is 0: vLLM's own loggers read their own names there and
skip zeros, so that nothing changes when nobody takes the entry out again (`detach`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from express_vllm.budget import Budget
from express_vllm.kvsize import KVSize

#: Attribute of a ModelRunnerOutput: seconds of the step that were spent compacting.
COMPACTION_SECONDS = "express_compaction_seconds"
#: Gauges are computed at most this often, in seconds.
PERIOD = 0.05
NAME = "express:"


class Tracked:
    """One request in the engine: its budget and how far it has come."""

    __slots__ = ("budget", "layout", "most")

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.layout = budget.layout
        self.most = 0

    def advance(self, start: int, stop: int) -> tuple[int, int]:
        """Tokens [start, stop) are processed; -> compactions, entries that they thin out."""
        self.most = max(self.most, stop)
        events = self.layout.events_done(stop) - self.layout.events_done(start)
        return events, self.layout.thinned(start, stop)


@dataclass
class EngineStats:
    """Counts since the last `take`; nothing is kept when vLLM's statistics are off."""

    size: KVSize
    enabled: bool = True
    requests: list[tuple[str, int, int]] = field(default_factory=list)
    finished: list[tuple[int, int]] = field(default_factory=list)
    compactions: int = 0
    thinned: int = 0
    compaction_seconds: float = 0.0
    _taken: float = 0.0

    def arrived(self, budget: Budget) -> None:
        if self.enabled:
            self.requests.append((budget.mode, budget.memory_tokens, budget.compute_tokens))

    def advanced(self, compactions: int, thinned: int) -> None:
        self.compactions += compactions
        self.thinned += thinned

    def left(self, tracked: Tracked) -> None:
        """A request has finished or was aborted; one that never ran has no peak."""
        if tracked.most and self.enabled:
            peak = self.size.tokens(tracked.budget.reserved(tracked.most))
            self.finished.append((peak, tracked.most))

    def take(self, busy: bool, running: Iterable[tuple[Budget, int]]) -> dict[str, Any]:
        """What happened since the last call.

        `running` gives the budgets and tokens of the running requests, `busy` says whether there
        are any; it is read at most every PERIOD seconds, and always when they have all left.
        """
        payload: dict[str, Any] = {
            "requests": self.requests, "finished": self.finished,
            "compactions": self.compactions, "thinned": self.thinned,
            "compaction_seconds": self.compaction_seconds,
        }  # fmt: skip
        payload = {name: value for name, value in payload.items() if value}
        self.requests, self.finished = [], []
        self.compactions = self.thinned = 0
        self.compaction_seconds = 0.0
        now = time.monotonic()
        if busy and now - self._taken < PERIOD:
            return payload
        self._taken = now
        pairs = list(running)
        modes: dict[str, int] = {}
        for budget, _ in pairs:
            modes[budget.mode] = modes.get(budget.mode, 0) + 1
        payload["held"] = sum(self.size.tokens(b.reserved(tokens)) for b, tokens in pairs)
        payload["exact"] = sum(tokens for _, tokens in pairs)
        payload["running"] = modes
        return payload


def attach(scheduler_stats: Any, payload: dict[str, Any]) -> None:
    scheduler_stats.num_kv_fetch_reqs_by_stage[NAME + json.dumps(payload)] = 0


def detach(scheduler_stats: Any) -> dict[str, Any] | None:
    """Take the numbers out of a SchedulerStats; None if there are none."""
    stages = scheduler_stats.num_kv_fetch_reqs_by_stage
    for name in stages:
        if name.startswith(NAME):
            del stages[name]
            return json.loads(name[len(NAME) :])
    return None
