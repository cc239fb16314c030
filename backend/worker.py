"""vLLM workers that hand the scheduler's budgets to the attention backend."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.cpu_worker import CPUWorker

from express_vllm.scheduler.scheduler import STEP_BUDGETS

from .step import Step, set_step


class ExpressCPUWorker(CPUWorker):
    """Model Runner V1 on the CPU: the batch order is the runner's input batch."""

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        runner = self.model_runner
        budgets = getattr(scheduler_output, STEP_BUDGETS, {})
        set_step(Step(budgets, lambda: runner.input_batch.req_ids))
        return super().execute_model(scheduler_output, *args, **kwargs)
