"""The CPU platform with express."""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform

from .common import ExpressPlatformMixin


class ExpressCpuPlatform(ExpressPlatformMixin, CpuPlatform):
    express_worker = "express_vllm.backend.cpu.worker.ExpressCPUWorker"
