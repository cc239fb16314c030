"""The worker on CPUs: Model Runner V1."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from ..worker import BudgetsMixin


class ExpressCPUWorker(BudgetsMixin, CPUWorker):
    pass
