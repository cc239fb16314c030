"""The Triton kernels against the oracle: on the CPU in the interpreter, small; on a GPU, in full.

Marker `gpu` selects the compiled runs.  Everything else sets TRITON_INTERPRET before Triton loads.
"""

import math
import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from express_vllm.backend.kernels import decode, step  # noqa: E402
from express_vllm.backend.kernels.step import Chunk, StepPlan  # noqa: E402
from express_vllm.layout import Layout, make_shape  # noqa: E402
from express_vllm.reference.attention import attend, log_weights  # noqa: E402
from express_vllm.reference.cache import ExpressCache  # noqa: E402

DEVICE = torch.device("cuda" if GPU else "cpu")
SEED, LAYER, FIRST_HEAD = 2**33 + 5, 3, 4


class Runner:
    """One layer of requests of one cache shape over poisoned, shuffled pages."""

    def __init__(self, layout, dtype, head_size, *, heads=2, group=3, block_size=16, requests=1,
                 tokens=4096):  # fmt: skip
        self.layout, self.heads, self.group, self.size = layout, heads, group, head_size
        blocks = -(-min(layout.shape.slots, tokens) // block_size)
        pages = requests * blocks + 3
        self.cache = torch.full(
            (pages, heads, block_size, 2 * head_size), torch.nan, dtype=dtype, device=DEVICE
        )
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(1))
        self.table = order[: requests * blocks].view(requests, blocks).int().to(DEVICE)
        self.stored = [0] * requests
        self.scale = head_size**-0.5
        self.zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def prefill(self, batch, counts):
        """Process counts[r] further tokens of each request; batch: q, k, v of the step's tokens."""
        chunks, token = [], 0
        for r, count in enumerate(counts):
            if count:
                start = self.stored[r]
                chunks.append(Chunk(start, start + count, token, r, SEED + r))
                self.stored[r] += count
            token += count
        plan = StepPlan.make(self.layout, chunks, self.group, DEVICE)
        output = torch.full_like(batch[0], torch.nan)
        step.run_chunks(plan, *batch, self.cache, self.table, LAYER, FIRST_HEAD, self.scale, output)
        return output

    def decode(self, batch):
        """One further token of every request."""
        due = [
            Chunk(n, n + 1, 0, r, SEED + r)
            for r, n in enumerate(self.stored)
            if self.layout.events(n, n + 1)
        ]
        if due:
            plan = StepPlan.make(self.layout, due, self.group, DEVICE, compacting=True)
            step.compact_pages(
                plan, self.cache, self.zero, self.zero + LAYER, self.table, FIRST_HEAD,
                self.scale, self.group,
            )  # fmt: skip
        query, key, value = batch
        live, rings, starts, steps = [], [], [], []
        shape = self.layout.shape
        for n in self.stored:
            live.append(self.layout.live(n + 1))
            upcoming = shape.first_event + self.layout.events_done(n + 1) * shape.interval
            row = n - (upcoming - 32)
            kept = shape.ring and row >= 0
            rings.append(2 * (shape.slots - shape.ring) + row if kept else -1)
            first, rise = decode.segment_steps(self.layout.segments(n + 1))
            starts.append(torch.from_numpy(first))
            steps.append(torch.from_numpy(rise))
        live, ring = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (live, rings))
        decode.store_tokens(query, key, value, self.cache, self.table, live, ring)
        output = torch.full_like(query, torch.nan)
        scratch = decode.DecodeScratch(len(live), query.shape[1], self.size, shape.slots, DEVICE)
        scratch.part.fill_(torch.nan)
        decode.decode_attention(
            query, self.cache, self.table, live, torch.stack(starts).to(DEVICE),
            torch.stack(steps).to(DEVICE), self.scale, scratch, output,
        )  # fmt: skip
        self.stored = [n + 1 for n in self.stored]
        return output

    def slots(self, r):
        """Live rows of request r, [KV heads, live, 2 d]."""
        rows = self.cache[self.table[r].long()].transpose(0, 1).flatten(1, 2)
        return rows[:, : self.layout.live(self.stored[r])]


def tokens(count, heads, group, size, dtype, seed=0):
    """Random queries [T, heads, d] and keys, values [T, KV heads, d]."""
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(count, heads * group, size, generator=generator)
    key, value = torch.randn(2, count, heads, size, generator=generator)
    return [x.to(dtype).to(DEVICE) for x in (query, 1.5 * key, value)]


def oracle(layout, batch, heads, group, seed=SEED):
    """Outputs [T, heads, d] in fp64, and the kept positions of each KV head."""
    query, key, value = (x.double().cpu() for x in batch)
    size = query.shape[2]
    outputs, caches = [], []
    for h in range(heads):
        cache = ExpressCache(layout, size, seed=seed, layer=LAYER, kv_head=FIRST_HEAD + h)
        rows = query.view(-1, heads, group, size)[:, h]
        outputs.append(cache.extend(rows, key[:, h], value[:, h]))
        caches.append(cache)
    return torch.stack(outputs, 1).flatten(1, 2), caches


def error(ours, expected):
    difference = (ours.double().cpu() - expected).norm() / expected.norm()
    return float(difference) if math.isfinite(difference) else math.inf


def kept_share(runner, batch, caches, r=0):
    """Share of live slots that hold the token that the oracle keeps there."""
    ours = runner.slots(r)
    same = [
        (ours[h, :, : runner.size] == batch[1][cache.positions.to(DEVICE), h]).all(-1)
        for h, cache in enumerate(caches)
    ]
    return float(torch.cat(same).float().mean())


def chunks(total, size):
    return [min(size, total - at) for at in range(0, total, size)]


def drive(runner, batch, counts):
    outputs, at = [], 0
    for count in counts:
        part = [x[at : at + count] for x in batch]
        outputs.append(runner.decode(part) if count == 1 else runner.prefill(part, [count]))
        at += count
    return torch.cat(outputs)


@pytest.mark.parametrize(
    ("schedule", "slots", "size", "group", "counts"),
    [
        ("lazy", 128, 64, 2, [63, 65, 111, *[1] * 9]),
        ("paper", 128, 64, 1, [64, 137, *[1] * 35]),
    ],
)
def test_a_request_equals_the_oracle(schedule, slots, size, group, counts):
    heads, total = 1, sum(counts)
    layout = Layout(make_shape(slots, schedule=schedule))
    batch = tokens(total, heads, group, size, torch.float32)
    runner = Runner(layout, torch.float32, size, heads=heads, group=group)
    outputs = drive(runner, batch, counts)
    expected, caches = oracle(layout, batch, heads, group)
    assert kept_share(runner, batch, caches) == 1.0
    assert error(outputs, expected) < 1e-5
