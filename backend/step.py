"""The current step's budgets, handed from the worker to the metadata builders of one process.

vLLM builds attention metadata without request ids; the worker knows them.  A `Step` is set for the
duration of one model execution; outside of it (profiling, graph capture, dummy batches) there are
no requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from express_vllm.budget import Budget


@dataclass
class Step:
    """Budgets by request id, and the ids of a batch's requests in its order.

    `request_ids` takes vLLM's CommonAttentionMetadata of the batch.
    """

    budgets: Mapping[str, Budget] = field(default_factory=dict)
    request_ids: Callable[[Any], Sequence[str]] = lambda common: ()

    def batch(self, common: Any) -> list[Budget | None]:
        """The budgets of the batch's requests; None for those without and for padding."""
        budgets = [self.budgets.get(name) for name in self.request_ids(common)]
        return budgets[: common.num_reqs] + [None] * (common.num_reqs - len(budgets))


_NONE = Step()
_current = _NONE


@contextmanager
def running(step: Step) -> Iterator[None]:
    """Make `step` the current one."""
    global _current
    _current = step
    try:
        yield
    finally:
        _current = _NONE


def current_step() -> Step:
    return _current
