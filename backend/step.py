"""The current step's budgets, handed from the worker to the metadata builders of one process.

vLLM builds attention metadata without request ids; the worker knows them.  It says what runs: a
`Step` for the duration of one model execution, `IDLE` while vLLM profiles, captures graphs or runs
dummy batches.  A batch that comes without either, or a request without a budget, is an error:
attention over all tokens would write past the request's blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from express_vllm.budget import Budget
from express_vllm.shape import EXACT_SHAPE


class MissingBudget(RuntimeError):
    """vLLM ran requests past express's worker or scheduler."""


@dataclass(frozen=True)
class Step:
    """Budgets by request id, and the ids of a batch's requests in its order.

    `request_ids` takes vLLM's CommonAttentionMetadata of the batch.  `budgets` is None where vLLM
    warms up with requests of its own, which hold every token.
    """

    budgets: Mapping[str, Budget] | None
    request_ids: Callable[[Any], Sequence[str]]

    def of(self, names: Sequence[str]) -> list[Budget]:
        """The budgets of requests `names`.  Raises MissingBudget."""
        if self.budgets is None:
            return [MADE_UP] * len(names)
        if missing := [name for name in names if name not in self.budgets]:
            raise MissingBudget(
                f"requests {missing[:3]} run without a budget: the step has those of "
                f"{len(self.budgets)} others"
            )
        return [self.budgets[name] for name in names]


#: Of requests that vLLM makes up: they keep every token.
MADE_UP = Budget("exact", 0, 0, 0, "recent", 0, EXACT_SHAPE)
#: No requests.
IDLE = Step({}, lambda common: ())
_current: Step | None = None


@contextmanager
def running(step: Step) -> Iterator[None]:
    """Make `step` the current one."""
    global _current
    before, _current = _current, step
    try:
        yield
    finally:
        _current = before


def current_step() -> Step:
    """What runs.  Raises MissingBudget if nobody said."""
    if _current is None:
        raise MissingBudget(
            "a batch runs without budgets: the worker is not express's (is --worker-cls set, or an "
            "executor that calls the model runner itself?)"
        )
    return _current


def made_up() -> bool:
    """Whether vLLM warms up: what it executes now are not requests of its scheduler."""
    return _current is IDLE
