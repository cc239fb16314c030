"""vLLM's schedulers with budgets: resolved when a request arrives, attached to every step."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from express_vllm.budget import Budget, resolve
from express_vllm.platforms.common import server_config

from .manager import ExpressManager

#: Attribute of a SchedulerOutput: request id -> Budget, for every request in the step.
STEP_BUDGETS = "express_budgets"


class _BudgetsMixin:
    """Owns request id -> budget; managers and workers only read it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.express_config = server_config(self.vllm_config)  # type: ignore[attr-defined]
        self.express_budgets: dict[str, Budget] = {}
        coordinator = self.kv_cache_manager.coordinator  # type: ignore[attr-defined]
        for manager in coordinator.single_type_managers:
            if isinstance(manager, ExpressManager):
                manager.budgets = self.express_budgets

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.express_budgets:
            params = request.sampling_params
            self.express_budgets[request.request_id] = resolve(
                params.extra_args if params is not None else None,
                self.express_config,
                prompt_tokens=request.num_prompt_tokens,
                max_tokens=request.max_tokens,
                max_model_len=self.max_model_len,  # type: ignore[attr-defined]
            )
        super().add_request(request)  # type: ignore[misc]

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        budgets = {name: self.express_budgets[name] for name in output.num_scheduled_tokens}
        setattr(output, STEP_BUDGETS, budgets)
        return output

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)  # type: ignore[misc]
        self.express_budgets.pop(request.request_id, None)


class ExpressScheduler(_BudgetsMixin, Scheduler):
    """The synchronous scheduler (CPU)."""


class ExpressAsyncScheduler(_BudgetsMixin, AsyncScheduler):
    """The asynchronous scheduler (CUDA)."""
