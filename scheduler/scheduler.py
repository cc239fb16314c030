"""vLLM's schedulers with budgets, read when a request arrives and attached to every step, and with
cached states."""

from __future__ import annotations

import logging
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import Request

from express_vllm.budget import Budget
from express_vllm.edge import granted
from express_vllm.settings import Settings

from .manager import ExpressManager
from .reuse import Reuse
from .stats import COMPACTION_SECONDS, EngineStats, Tracked, attach

logger = logging.getLogger("vllm.express")

#: Attribute of a SchedulerOutput: request id -> Budget, for every request in the step.
STEP_BUDGETS = "express_budgets"


class _BudgetsMixin:
    """Owns request id -> budget; managers and workers only read it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.express_settings = Settings.of(self.vllm_config)  # type: ignore[attr-defined]
        self.express_budgets: dict[str, Budget] = {}
        self.express_tracked: dict[str, Tracked] = {}
        self.express_stats = EngineStats(self.express_settings.size, self.log_stats)  # type: ignore[attr-defined]
        #: (client, request id) of requests that end with an error of their own.
        self.express_refused: list[tuple[int, str]] = []
        managers = self.kv_cache_manager.coordinator.single_type_managers  # type: ignore[attr-defined]
        ours = [manager for manager in managers if isinstance(manager, ExpressManager)]
        for manager in ours:
            manager.budgets = self.express_budgets
        self.express_manager = manager = ours[0]
        manager.shares = manager.enable_caching and not self.express_settings.config.wide_layers
        # Off where there are several managers (platforms/common.py).
        self.express_reuse = Reuse(manager, self.requests) if manager.enable_caching else None  # type: ignore[attr-defined]

    def add_request(self, request: Request) -> None:
        """Never raises: an exception here would end the engine and every other request."""
        name = request.request_id
        try:
            budget = granted(request, self.express_settings)
        except ValueError as error:
            self._refuse(request, str(error))
            return
        if name in self.requests:  # type: ignore[attr-defined]
            self._refuse(request, "its id is that of a request that runs")
            return
        self.express_budgets[name] = budget
        self.express_tracked[name] = Tracked(budget)
        self.express_stats.arrived(budget)
        if self.express_reuse:
            self.express_reuse.arrived(request)
        super().add_request(request)  # type: ignore[misc]

    def _refuse(self, request: Request, reason: str) -> None:
        """End a request that the scheduler has not taken; the next step tells its client."""
        name, client = request.request_id, request.client_index
        logger.error("express: request %r ends with an error: %s", name, reason)
        running = self.requests.get(name)  # type: ignore[attr-defined]
        if running is not None and running.client_index == client:
            return  # the client could not tell the two apart
        self.express_refused.append((client, name))
        if running is not None:
            return
        # vLLM takes a step while it has ids of finished requests to pass on.
        self.finished_req_ids.add(name)  # type: ignore[attr-defined]
        by_client = self.finished_req_ids_dict  # type: ignore[attr-defined]
        if by_client is not None:
            by_client[client].add(name)

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        if not (self.express_reuse and self._looks_up(request)):
            return super()._get_local_prefix_cache_hit(request)  # type: ignore[misc]
        blocks, tokens = self.express_reuse.find(request)
        manager = self.kv_cache_manager  # type: ignore[attr-defined]
        return manager.create_kv_cache_blocks((blocks,)), tokens, 0, False

    def _ec_transfer_pending(self, request: Request, num_computed_tokens: int) -> bool:
        """vLLM passes over a request for a step if this holds."""
        if super()._ec_transfer_pending(request, num_computed_tokens):  # type: ignore[misc]
            return True
        if not (self.express_reuse and self._looks_up(request)):
            return False
        return self.express_reuse.waits(request, num_computed_tokens)

    def _looks_up(self, request: Request) -> bool:
        """Whether a request may start from what is cached: one that wants its prompt's
        log-probabilities may not."""
        return self.kv_cache_manager.prefix_cache_lookup_enabled(request)  # type: ignore[attr-defined]

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """vLLM asks here how many of the tokens it wants to compute in a step."""
        count = super()._reserve_prefill_lookahead(  # type: ignore[misc]
            request, num_computed_tokens, num_new_tokens
        )
        if self.express_reuse:
            return self.express_reuse.clip(request, num_computed_tokens, count)
        return count

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        if self.express_reuse:
            self.express_reuse.step_starts(self.running)  # type: ignore[attr-defined]
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
        outputs = super().update_from_output(  # type: ignore[misc]
            scheduler_output, model_runner_output
        )
        for client, name in self.express_refused:
            of_client = outputs.setdefault(client, EngineCoreOutputs())
            of_client.outputs.append(EngineCoreOutput(name, [], finish_reason=FinishReason.ERROR))
        self.express_refused = []
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        stats = super().make_stats(*args, **kwargs)  # type: ignore[misc]
        if stats is not None:
            running = self.running  # type: ignore[attr-defined]
            pairs = ((self.express_budgets[r.request_id], r.num_computed_tokens) for r in running)
            attach(stats, self.express_stats.take(bool(running), pairs))
        return stats

    def _free_request_blocks(self, request: Request) -> None:
        """Of a request that has ended or is preempted."""
        self.express_manager.keep(request)
        super()._free_request_blocks(request)  # type: ignore[misc]

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)  # type: ignore[misc]
        if self.express_reuse:
            self.express_reuse.left(request)
        self.express_budgets.pop(request.request_id, None)
        if tracked := self.express_tracked.pop(request.request_id, None):
            self.express_stats.left(tracked)


class ExpressScheduler(_BudgetsMixin, Scheduler):
    """The synchronous scheduler (CPU)."""


class ExpressAsyncScheduler(_BudgetsMixin, AsyncScheduler):
    """The asynchronous scheduler (CUDA)."""
