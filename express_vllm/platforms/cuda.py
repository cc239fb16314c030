"""The NVIDIA platform with express."""

from __future__ import annotations

from vllm.platforms.cuda import CudaPlatform

from .common import ExpressPlatformMixin


class ExpressCudaPlatform(ExpressPlatformMixin, CudaPlatform):
    express_worker = "express_vllm.backend.gpu.worker.ExpressGPUWorker"
