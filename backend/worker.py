"""What both workers do: hand the scheduler's budgets to the attention backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput

from express_vllm.platforms.common import server_config
from express_vllm.scheduler.scheduler import STEP_BUDGETS

from .attention import layer_index
from .step import Step, running
from .timing import stamp


class BudgetsMixin:
    """Sets the current step around every model execution."""

    model_runner: Any
    vllm_config: Any

    def get_kv_cache_spec(self) -> dict[str, Any]:
        config = server_config(self.vllm_config)
        wide = frozenset(config.wide_layers or ())
        return {
            name: spec.widened(config.wide_factor) if layer_index(name) in wide else spec
            for name, spec in super().get_kv_cache_spec().items()  # type: ignore[misc]
        }

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        budgets = getattr(scheduler_output, STEP_BUDGETS, {})
        with running(Step(budgets, batch_order(self.model_runner))):
            output = super().execute_model(  # type: ignore[misc]
                scheduler_output, *args, **kwargs
            )
        return stamp(output)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return stamp(super().sample_tokens(*args, **kwargs))  # type: ignore[misc]


def batch_order(runner: Any) -> Callable[[Any], Sequence[str]]:
    """Request ids in batch order: from Model Runner V2's request states, or V1's input batch."""
    states = getattr(runner, "req_states", None)
    if states is None:
        return lambda common: runner.input_batch.req_ids
    return lambda common: [states.index_to_req_id[int(index)] for index in common.req_idx]
