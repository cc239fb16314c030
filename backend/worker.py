"""vLLM workers that hand the scheduler's budgets to the attention backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from express_vllm.scheduler.scheduler import STEP_BUDGETS

from .step import Step, running


class _BudgetsMixin:
    """Sets the current step around every model execution."""

    model_runner: Any

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        budgets = getattr(scheduler_output, STEP_BUDGETS, {})
        with running(Step(budgets, batch_order(self.model_runner))):
            return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]


def batch_order(runner: Any) -> Callable[[Any], Sequence[str]]:
    """Request ids in batch order: from Model Runner V2's request states, or V1's input batch."""
    states = getattr(runner, "req_states", None)
    if states is None:
        return lambda common: runner.input_batch.req_ids
    return lambda common: [states.index_to_req_id[int(index)] for index in common.req_idx]


class ExpressCPUWorker(_BudgetsMixin, CPUWorker):
    """On CPUs: Model Runner V1."""


class ExpressGPUWorker(_BudgetsMixin, Worker):
    """On NVIDIA GPUs: Model Runner V2."""

    def compile_or_warm_up_model(self) -> Any:
        from .gpu.warmup import warm_up

        warm_up(self.vllm_config, self.device)
        return super().compile_or_warm_up_model()
