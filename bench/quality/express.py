"""Our cache in the harness: the code that serves, on the CPU and on the GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from express_vllm.layout import layout_for
from express_vllm.shape import Shape
from express_vllm.softmax import Softmax

from .harness import Heads

#: Tokens of a page on CPUs and on GPUs: vLLM's defaults.
CPU_BLOCK, GPU_BLOCK = 128, 16


@dataclass(frozen=True)
class ForcedShape(Shape):
    """A shape whose halving kernel is not its schedule's: for the sweep."""

    forced: str = ""

    @property
    def kernel(self) -> str:
        return self.forced

    @classmethod
    def of(cls, shape: Shape, kernel: str) -> ForcedShape:
        return cls(*astuple(shape), forced=kernel)


class Plans:
    """The plans of a policy's steps: all layers share them."""

    def __init__(self, shape: Shape, seed: int, group: int) -> None:
        self.shape, self.seed, self.group = shape, seed, group
        self.known: dict[tuple[int, int, int], Any] = {}

    def get(self, key: tuple[int, int, int], make: Callable[[], Any]) -> Any:
        if key not in self.known:
            self.known = {key: make()}  # the layers of a step come one after the other
        return self.known[key]


class ExpressCache:
    """One layer of the paged cache; every sequence of the batch is a request."""

    #: Whether the Triton kernels run it; None: if tensors are on a GPU.
    triton: bool | None = None

    def __init__(self, heads: Heads, layer: int, plans: Plans) -> None:
        self.heads, self.layer, self.plans = heads, layer, plans
        self.pages: Tensor | None = None
        self.table: Tensor | None = None
        self.tokens = 0
        self.peak = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, size = query.shape
        self._allocate(key)
        rows = [x.transpose(1, 2).flatten(0, 1).contiguous() for x in (query, key, value)]
        output = torch.empty_like(rows[0])
        triton = key.is_cuda if self.triton is None else self.triton
        run = self._run_gpu if triton else self._run_cpu
        run(*rows, output, batch, length)
        self.tokens += length
        self.peak = layout_for(self.plans.shape).reserved(self.tokens)  # never shrinks
        return output.view(batch, length, heads, size).transpose(1, 2)

    def fork(self) -> ExpressCache:
        twin = copy.copy(self)
        twin.pages = None if self.pages is None else self.pages.clone()
        return twin

    def _allocate(self, key: Tensor) -> None:
        if self.pages is not None:
            return
        block = GPU_BLOCK if key.is_cuda else CPU_BLOCK
        blocks = -(-self.plans.shape.slots // block)
        batch, heads, _, size = key.shape
        self.pages = key.new_zeros(batch * blocks, heads, block, 2 * size)
        self.table = torch.arange(batch * blocks, dtype=torch.int32).view(batch, blocks)
        self.table = self.table.to(key.device)

    def _run_cpu(
        self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, batch: int, length: int
    ) -> None:
        from express_vllm.backend.batch import Batch
        from express_vllm.backend.cpu.metadata import plan_batch
        from express_vllm.backend.cpu.path import CpuPath
        from express_vllm.budget import Budget

        heads, shape = self.heads, self.plans.shape
        budget = Budget("express", shape.slots, shape.slots, self.plans.seed, "recent",
                        shape.slots, shape)  # fmt: skip
        plan = self.plans.get(
            (self.tokens, length, batch),
            lambda: plan_batch(
                Batch(
                    [], [budget] * batch, length * np.arange(batch + 1),
                    np.full(batch, self.tokens + length),
                ),
                self.table.numpy(), CPU_BLOCK,
            ),
        )  # fmt: skip
        softmax = Softmax(heads.scale)
        path = CpuPath(self.layer, 0, heads.kv, heads.group, heads.size, softmax)
        path.forward(query, key, value, self.pages, plan, output)

    def _run_gpu(
        self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, batch: int, length: int
    ) -> None:
        from express_vllm.backend.chunk import Chunk
        from express_vllm.backend.kernels import step
        from express_vllm.backend.kernels.plan import StepPlan

        shape = self.plans.shape
        if shape.schedule == "lazy" and shape.kernel != "gaussian":
            raise ValueError(f"on GPUs schedule lazy has kernel gaussian, not {shape.kernel}")
        start = self.tokens
        plan = self.plans.get(
            (start, length, batch),
            lambda: StepPlan.make(
                [Chunk(layout_for(self.plans.shape), start, start + length, r * length, r,
                       self.plans.seed)
                 for r in range(batch)],
                self.heads.group, query.device,
            ),
        )  # fmt: skip
        step.run_chunks(
            plan, query, key, value, self.pages, self.table, self.layer, 0,
            Softmax(self.heads.scale), output,
        )  # fmt: skip
