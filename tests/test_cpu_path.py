"""One layer on the CPU path, over real pages: against the oracle, and whatever the chunking."""

import itertools

import pytest
import torch
from budgets import resolve

from express_vllm.backend.cpu.metadata import plan_batch
from express_vllm.backend.cpu.path import CpuPath
from express_vllm.config import ServerConfig
from express_vllm.layout import layout_for
from express_vllm.reference.cache import ExpressCache

KV_HEADS, GROUP = 2, 3
SERVER = ServerConfig(seed=9)


class Sequence:
    """A request driven through `CpuPath` with its own blocks in a shared, poisoned page pool."""

    def __init__(self, runner, budget, batch, blocks):
        self.runner, self.budget, self.batch, self.blocks = runner, budget, batch, blocks
        self.stored = 0


class Runner:
    """Holds pages and runs steps of mixed requests, as vLLM does."""

    def __init__(self, head_size, dtype, block_size, pages=64):
        self.path = CpuPath(3, 4, KV_HEADS, GROUP, head_size, head_size**-0.5)
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
        plan = plan_batch(
            [s.budget for s, _ in work], starts, stops, table.numpy(), self.block_size, self.wide
        )
        output = torch.full(
            (starts[-1], KV_HEADS * GROUP, self.head_size), torch.nan, dtype=self.dtype
        )
        self.path.forward(query, key, value, self.cache, plan, output)
        return [output[a:b] for a, b in itertools.pairwise(starts)]

    def slots(self, sequence):
        """The live rows of a sequence, [KV heads, live, 2 d]."""
        layout = sequence.budget.layout
        live = layout.live(sequence.stored) if layout else sequence.stored
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


@pytest.mark.parametrize(
    ("head_size", "dtype", "options"),
    [
        (64, torch.float32, {}),
        (64, torch.float32, {"exponent": 0.5}),
        (96, torch.bfloat16, {}),
        (33, torch.float32, {}),
        (120, torch.bfloat16, {}),
        (128, torch.float16, {}),
        (256, torch.float32, {"schedule": "paper"}),
    ],
)
def test_equals_the_oracle(head_size, dtype, options):
    total = 700
    batch = make_batch(total, head_size, 0, dtype)
    runner = Runner(head_size, dtype, 16)
    sequence = runner.start(batch, memory_tokens=192)
    sequence.budget = resolve(
        {"express_memory_tokens": 192},
        ServerConfig(seed=9, **options),
        prompt_tokens=total,
        max_tokens=0,
        max_model_len=8192,
    )
    outputs = drive(runner, sequence, [*chunks(500, 90), *[1] * (total - 500)]).double()
    layout = sequence.budget.layout
    for head in range(KV_HEADS):
        oracle = ExpressCache(
            layout_for(layout.shape),
            head_size,
            seed=9,
            layer=3,
            kv_head=4 + head,
            row_dtype=dtype,
        )
        query = batch[0].view(total, KV_HEADS, GROUP, head_size)[:, head].double()
        expected = oracle.extend(query, batch[1][:, head].double(), batch[2][:, head].double())
        kept = runner.slots(sequence)[head, :, :head_size]
        agree = (batch[1][oracle.positions, head] == kept).all(-1).float().mean()
        assert agree == 1.0
        if dtype == torch.float32:
            ours = outputs.view(total, KV_HEADS, GROUP, head_size)[:, head]
            assert torch.allclose(ours, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", [192, 512])
def test_cache_is_bit_identical_for_any_chunking(dtype, memory):
    total = 1200
    batch = make_batch(total, 64, 3, dtype)
    states = []
    ways = [
        [total],
        chunks(total, 256),
        chunks(total, 37),
        [*chunks(800, 111), *[1] * 400],
        [1] * total,
        [1, 600, 1, 1, 597],
    ]
    for steps in ways:
        runner = Runner(64, dtype, 32)
        sequence = runner.start(batch, memory_tokens=memory)
        outputs = drive(runner, sequence, steps)
        assert outputs.isfinite().all(), "no poisoned slot was read"
        states.append(runner.slots(sequence))
    assert all(torch.equal(states[0], other) for other in states[1:])


def test_mixed_batches_do_not_change_a_sequence():
    batches = [make_batch(600, 64, seed) for seed in range(4)]
    fields = [
        {"memory_tokens": 192},
        {"mode": "exact"},
        {"memory_tokens": 256, "seed": 3},
        {"memory_tokens": 512, "profile": "even"},
    ]
    alone = []
    for batch, asked in zip(batches, fields, strict=True):
        runner = Runner(64, torch.float32, 16)
        sequence = runner.start(batch, **asked)
        outputs = drive(runner, sequence, [*chunks(400, 80), *[1] * 200])
        alone.append((runner.slots(sequence).clone(), outputs))
    runner = Runner(64, torch.float32, 16, pages=128)
    sequences = [runner.start(b, **f) for b, f in zip(batches, fields, strict=True)]
    mixed = [[] for _ in sequences]
    turn = 0
    while any(s.stored < 600 for s in sequences):
        work = []
        for i, s in enumerate(sequences):
            left = 600 - s.stored
            if left and (turn + i) % 3:
                work.append((s, min(left, 1 if s.stored >= 400 else (50, 1, 77)[(turn + i) % 3])))
        if work:
            for (s, _), out in zip(work, runner.step(work), strict=True):
                mixed[sequences.index(s)].append(out)
        turn += 1
    for sequence, parts, (state, outputs) in zip(sequences, mixed, alone, strict=True):
        assert torch.equal(runner.slots(sequence), state)
        assert torch.allclose(torch.cat(parts), outputs, rtol=1e-4, atol=1e-5)


def test_a_fitting_budget_is_exact_attention():
    batch = make_batch(300, 64, 5)
    runner = Runner(64, torch.float32, 16)
    outputs = drive(runner, runner.start(batch, memory_tokens=512), [*chunks(200, 64), *[1] * 100])
    other = Runner(64, torch.float32, 16)
    exact = drive(other, other.start(batch, mode="exact"), [*chunks(200, 64), *[1] * 100])
    assert torch.equal(outputs, exact)
    query, key, value = (x.double().transpose(0, 1)[None] for x in batch)
    truth = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )[0].transpose(0, 1)
    assert torch.allclose(outputs.double(), truth, rtol=1e-4, atol=1e-5)
