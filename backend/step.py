"""The current step's budgets, handed from the worker to the metadata builders of one process.

vLLM builds attention metadata without request ids; the worker knows them.  A `Step` is replaced
before every model execution and read only while metadata is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from express_vllm.budget import Budget


@dataclass
class Step:
    """Budgets by request id and the batch order of the ids."""

    budgets: Mapping[str, Budget] = field(default_factory=dict)
    request_ids: Callable[[], Sequence[str]] = tuple

    def batch(self, count: int) -> list[Budget | None]:
        """The budgets of the batch's first `count` requests; None for dummy runs."""
        ids = list(self.request_ids())[:count]
        budgets = [self.budgets.get(name) for name in ids]
        return budgets + [None] * (count - len(budgets))


_current = Step()


def set_step(step: Step) -> None:
    global _current
    _current = step


def current_step() -> Step:
    return _current
