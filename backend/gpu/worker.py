"""The worker on NVIDIA GPUs: Model Runner V2."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from ..worker import BudgetsMixin
from .warmup import warm_up


class ExpressGPUWorker(BudgetsMixin, Worker):
    def compile_or_warm_up_model(self) -> Any:
        warm_up(self.vllm_config, self.device)
        return super().compile_or_warm_up_model()
