"""One layer on the CPU path over real pages, driven with batches as vLLM does."""

import itertools

import numpy as np
import torch
from budgets import resolve

from express_vllm.backend.batch import Batch
from express_vllm.backend.cpu.metadata import plan_batch
from express_vllm.backend.cpu.path import CpuPath
from express_vllm.config import ServerConfig
from express_vllm.softmax import Softmax

KV_HEADS, GROUP = 2, 3
SERVER = ServerConfig(seed=9)


class Sequence:
    """A request driven through `CpuPath` with its own blocks in a shared, poisoned page pool."""

    def __init__(self, runner, budget, batch, blocks):
        self.runner, self.budget, self.batch, self.blocks = runner, budget, batch, blocks
        self.stored = 0


class Runner:
    """Holds pages and runs steps of mixed requests, as vLLM does."""

    def __init__(self, head_size, dtype, block_size, pages=64, softmax=None):
        softmax = softmax or Softmax(head_size**-0.5)
        self.path = CpuPath(3, 4, KV_HEADS, GROUP, head_size, softmax)
        self.dtype, self.block_size, self.head_size = dtype, block_size, head_size
        self.cache = torch.full(
            (pages, KV_HEADS, block_size, 2 * head_size), torch.nan, dtype=dtype
        )
        self.wide = False
        self.free = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).tolist()

    def start(self, batch, config=SERVER, **fields):
        budget = resolve(
            {f"express_{k}": v for k, v in fields.items()},
            config,
            prompt_tokens=len(batch[0]),
            max_tokens=0,
            max_model_len=8192,
        )
        page = self.block_size // config.wide_factor if self.wide else self.block_size
        count = -(-budget.reserved(len(batch[0])) // page)
        blocks = [self.free.pop() for _ in range(count)]
        return Sequence(self, budget, batch, blocks)

    def step(self, work):
        """work: [(sequence, tokens)] -> outputs per sequence."""
        width = max(len(s.blocks) for s, _ in work)
        table = torch.zeros(len(work), width, dtype=torch.int32)
        starts, stops, parts = [0], [], []
        for r, (s, count) in enumerate(work):
            table[r, : len(s.blocks)] = torch.tensor(s.blocks)
            parts.append([x[s.stored : s.stored + count] for x in s.batch])
            s.stored += count
            starts.append(starts[-1] + count)
            stops.append(s.stored)
        query, key, value = (torch.cat([p[i] for p in parts]).to(self.dtype) for i in range(3))
        budgets = [s.budget for s, _ in work]
        batch = Batch([], budgets, np.array(starts), np.array(stops), self.wide)
        plan = plan_batch(batch, table.numpy(), self.block_size)
        output = torch.full(
            (starts[-1], KV_HEADS * GROUP, self.head_size), torch.nan, dtype=self.dtype
        )
        self.path.forward(query, key, value, self.cache, plan, output)
        return [output[a:b] for a, b in itertools.pairwise(starts)]

    def slots(self, sequence):
        """The live rows of a sequence, [KV heads, live, 2 d]."""
        layout = sequence.budget.layout
        live = layout.live(sequence.stored)
        rows = self.cache[sequence.blocks].transpose(0, 1).flatten(1, 2)
        return rows[:, :live]


def make_batch(count, head_size, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(count, KV_HEADS * GROUP, head_size, generator=generator)
    key, value = torch.randn(2, count, KV_HEADS, head_size, generator=generator)
    return [x.to(dtype) for x in (query, 1.5 * key, value)]


def drive(runner, sequence, steps):
    return torch.cat([runner.step([(sequence, n)])[0] for n in steps])


def chunks(total, size):
    return [min(size, total - at) for at in range(0, total, size)]
