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

    def batch(self, common: Any) -> list[Budget | None]:
        """The budgets of the batch's requests; None for padding and for made-up requests."""
        budgets = self.of(self.request_ids(common)[: common.num_reqs])
        return budgets + [None] * (common.num_reqs - len(budgets))

    def of(self, names: Sequence[str]) -> list[Budget | None]:
        """The budgets of requests `names`.  Raises MissingBudget."""
        if self.budgets is None:
            return [None] * len(names)
        if missing := [name for name in names if name not in self.budgets]:
            raise MissingBudget(
                f"requests {missing[:3]} run without a budget: the step has those of "
                f"{len(self.budgets)} others"
            )
        return [self.budgets[name] for name in names]


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


def plain_batch(common_prefix_len: int, common: Any) -> None:
    """Raises NotImplementedError for a batch that is not plain causal decoding and prefill.

    `common` is vLLM's CommonAttentionMetadata.
    """
    found = {
        "cascade attention": common_prefix_len != 0,
        "attention that is not causal": common.causal is not True,
        "an encoder's batch": common.encoder_seq_lens is not None,
        "context parallelism": common.dcp_local_seq_lens is not None,
        "multimodal prefixes": common.mm_req_doc_ranges is not None,
        "reference sliding windows": common.rswa_prefix_lens is not None,
    }
    if names := [name for name, active in found.items() if active]:
        raise NotImplementedError(f"express runs no batch with {' and '.join(names)}")
