"""What both workers do: hand the scheduler's budgets to the attention backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput

from express_vllm.device import uses_triton
from express_vllm.patches import name_requests_of_state_models
from express_vllm.scheduler.scheduler import STEP_BUDGETS
from express_vllm.scheduler.spec import check_layers
from express_vllm.settings import Settings

from .indices import layer_index
from .step import IDLE, MissingBudget, Step, made_up, running
from .timing import stamp


class BudgetsMixin:
    """Sets the current step around every model execution."""

    model_runner: Any
    vllm_config: Any

    def get_kv_cache_spec(self) -> dict[str, Any]:
        settings = Settings.of(self.vllm_config)
        config, wide = settings.config, frozenset(settings.config.wide_layers or ())
        if settings.layers.states and uses_triton():
            name_requests_of_state_models()
        specs = super().get_kv_cache_spec()  # type: ignore[misc]
        check_layers({layer_index(name): spec for name, spec in specs.items()}, settings.layers)
        return {
            name: spec.widened(config.wide_factor) if layer_index(name) in wide else spec
            for name, spec in specs.items()
        }

    def determine_available_memory(self) -> Any:
        with running(IDLE):
            return super().determine_available_memory()  # type: ignore[misc]

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> Any:
        with running(IDLE):
            return super().initialize_from_config(*args, **kwargs)  # type: ignore[misc]

    def compile_or_warm_up_model(self) -> Any:
        with running(IDLE):
            return super().compile_or_warm_up_model()  # type: ignore[misc]

    def execute_dummy_batch(self) -> None:
        with running(IDLE):
            super().execute_dummy_batch()  # type: ignore[misc]

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        budgets = getattr(scheduler_output, STEP_BUDGETS, None)
        if budgets is None and not made_up():
            raise MissingBudget("a step without budgets: the scheduler is not express's")
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
