"""vLLM's schedulers with budgets: resolved when a request arrives, attached to every step."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from express_vllm.budget import Budget, resolve
from express_vllm.kvsize import KVSize
from express_vllm.platforms.common import server_config

from .manager import ExpressManager
from .stats import COMPACTION_SECONDS, EngineStats, Tracked, attach

#: Attribute of a SchedulerOutput: request id -> Budget, for every request in the step.
STEP_BUDGETS = "express_budgets"


class _BudgetsMixin:
    """Owns request id -> budget; managers and workers only read it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.vllm_config  # type: ignore[attr-defined]
        self.express_config = server_config(config)
        self.express_slot_bytes = KVSize.of(config, self.express_config).slot_bytes
        self.express_budgets: dict[str, Budget] = {}
        self.express_tracked: dict[str, Tracked] = {}
        self.express_stats = EngineStats(self.log_stats)  # type: ignore[attr-defined]
        coordinator = self.kv_cache_manager.coordinator  # type: ignore[attr-defined]
        for manager in coordinator.single_type_managers:
            if isinstance(manager, ExpressManager):
                manager.budgets = self.express_budgets

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.express_budgets:
            params = request.sampling_params
            budget = resolve(
                params.extra_args if params is not None else None,
                self.express_config,
                prompt_tokens=request.num_prompt_tokens,
                max_tokens=request.max_tokens,
                max_model_len=self.max_model_len,  # type: ignore[attr-defined]
                slot_bytes=self.express_slot_bytes,
            )
            self.express_budgets[request.request_id] = budget
            self.express_tracked[request.request_id] = Tracked(budget)
            self.express_stats.arrived(budget)
        super().add_request(request)  # type: ignore[misc]

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        budgets = {name: self.express_budgets[name] for name in output.num_scheduled_tokens}
        setattr(output, STEP_BUDGETS, budgets)
        for name, count in output.num_scheduled_tokens.items():
            stop = self.requests[name].num_computed_tokens  # type: ignore[attr-defined]
            self.express_stats.advanced(*self.express_tracked[name].advance(stop - count, stop))
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        seconds = getattr(model_runner_output, COMPACTION_SECONDS, 0.0)
        self.express_stats.compaction_seconds += seconds
        return super().update_from_output(  # type: ignore[misc]
            scheduler_output, model_runner_output
        )

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        stats = super().make_stats(*args, **kwargs)  # type: ignore[misc]
        if stats is not None:
            running = self.running  # type: ignore[attr-defined]
            pairs = ((self.express_budgets[r.request_id], r.num_computed_tokens) for r in running)
            attach(stats, self.express_stats.take(bool(running), pairs))
        return stats

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)  # type: ignore[misc]
        self.express_budgets.pop(request.request_id, None)
        if tracked := self.express_tracked.pop(request.request_id, None):
            self.express_stats.left(tracked)


class ExpressScheduler(_BudgetsMixin, Scheduler):
    """The synchronous scheduler (CPU)."""


class ExpressAsyncScheduler(_BudgetsMixin, AsyncScheduler):
    """The asynchronous scheduler (CUDA)."""
