"""Accuracy against attention's time a token: budgets by slots, the time of one layer's decode step.

The time is that of the kernels that serve, `backend/cpu` or `backend/kernels`, over the live slots
that a policy has at the end of the length; compactions are not in it.  Exact attention reads every
token, with the same kernel and with torch's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from express_vllm.layout import Segment, layout_for
from express_vllm.softmax import Softmax

from ..express import CPU_BLOCK, GPU_BLOCK
from ..harness import Heads
from ..policies import Policy
from ..progress import Progress
from ..run import Result, Rows, Run
from . import size
from .common import times

FILE = "paper/time"
SPLIT = "report"
BATCH = 16
POLICIES = ["express", "paper", "streaming"]
FULL = {"length": 8192, "first": 512, "slots": [512, 1024, 2048, 4096], "policies": POLICIES}
SMALL = {"length": 768, "first": 96, "slots": [128, 256, 384], "policies": POLICIES,
         "documents": 2}  # fmt: skip
#: Repetitions, and runs back to back in each, since one takes microseconds.
REPEATS = 41
TOGETHER = 20


def measure(run: Run) -> Result:
    slots = size.budgets(run, run.options.length)
    # A GPU's step of few requests takes as long as its launch.
    requests = run.options.requests or (512 if run.model.device.type == "cuda" else 1)
    rows = durations(run, size.policies(run, slots), requests)
    rows += size.accuracy(run, slots)
    return rows, {"slots": slots, "first": run.options.first, "requests": requests}


def durations(run: Run, policies: Sequence[Policy], requests: int) -> Rows:
    """A row per policy and slots: microseconds a token, of every repetition.

    Repetitions go round the policies, so that other load on the machine meets all alike.
    """
    rows: Rows = []
    timed: list[tuple[Callable[[], object], list[float]]] = []
    for policy in policies:
        step = Step(run.heads, held(policy, run.options.length), requests, run.model)
        for label, work in _kernels(policy, step).items():
            rows.append({"what": "time", "policy": label, "slots": policy.slots, "live": step.live,
                         "us": []})  # fmt: skip
            timed.append((work, rows[-1]["us"]))
    with Progress("durations", REPEATS * len(timed)) as progress:
        for _ in range(REPEATS):
            for work, found in timed:
                (ms,) = times(work, run.model.device, 1, together=TOGETHER)
                found.append(round(1e3 * ms / requests, 4))
                progress.step()
    return [row for row in rows if row["us"]]


def _kernels(policy: Policy, step: Step) -> dict[str, Callable[[], object]]:
    """What is timed under which name: exact attention also by torch."""
    return {policy.label: step.run} | ({"torch": step.torch} if policy.name == "exact" else {})


def held(policy: Policy, tokens: int) -> list[Segment]:
    """The live slots near `tokens` tokens: of the interval before, the state of median size."""
    if policy.name == "exact":
        return [Segment(tokens, 1, 0.0)]
    if policy.name not in ("express", "paper"):
        return [Segment(min(policy.slots, tokens), 1, 0.0)]
    layout = layout_for(policy.shape())
    near = range(max(1, tokens - layout.shape.interval), tokens)
    middle = statistics.median_low([layout.live(n) for n in near])
    return layout.segments(next(n for n in near if layout.live(n) == middle))


class Step:
    """One layer's attention of `requests` requests, one new token each, over random pages."""

    def __init__(
        self, heads: Heads, segments: Sequence[Segment], requests: int, model: torch.nn.Module
    ) -> None:
        self.heads, self.segments, self.requests = heads, segments, requests
        self.live = sum(s.length for s in segments)
        self.device, dtype = model.device, model.dtype
        self.block = GPU_BLOCK if self.device.type == "cuda" else CPU_BLOCK
        self.blocks = -(-self.live // self.block)
        generator = torch.Generator(self.device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device).to(dtype)

        self.pages = random(requests * self.blocks, heads.kv, self.block, 2 * heads.size)
        self.table = torch.arange(len(self.pages), dtype=torch.int32, device=self.device)
        self.table = self.table.view(requests, self.blocks)
        self.query = random(requests, heads.query, heads.size)
        self.key, self.value = random(2, requests, heads.kv, heads.size)
        make = self._gpu if self.device.type == "cuda" else self._cpu
        #: -> the outputs [requests, heads, d].
        self.run: Callable[[], Tensor] = make()
        self._dense: tuple[Tensor, Tensor] | None = None

    def _cpu(self) -> Callable[[], Tensor]:
        from express_vllm.backend.cpu.decode import DecodeBatch, decode_attention
        from express_vllm.reference.attention import log_weights

        weights = log_weights(self.segments, torch.float32).numpy()
        bias = weights if weights.any() else None
        count = self.requests
        batch = DecodeBatch.make(
            list(range(count)), [self.live] * count, self.table.numpy(), [bias] * count
        )
        query = self.query.float().view(count, self.heads.kv, self.heads.group, -1)
        return lambda: decode_attention(
            query, self.key, self.value, self.pages, batch, Softmax(self.heads.scale)
        ).flatten(1, 2)

    def _gpu(self) -> Callable[[], Tensor]:
        from express_vllm.backend.kernels import decode

        count, heads = self.requests, self.heads
        starts, steps = (
            torch.from_numpy(x).to(self.device).expand(count, -1).contiguous()
            for x in decode.segment_steps(self.segments)
        )
        live = torch.full((count,), self.live, dtype=torch.int32, device=self.device)
        output = torch.empty_like(self.query)
        scratch = decode.DecodeScratch(count, heads.query, heads.size, self.live, self.device)
        return lambda: decode.decode_attention(
            self.query, self.pages, self.table, live, starts, steps, Softmax(heads.scale), scratch,
            output,
        )  # fmt: skip

    def torch(self) -> Tensor:
        """The same without weights, by torch over dense keys and values."""
        if self._dense is None:
            pages = self.pages.unflatten(0, (self.requests, self.blocks)).transpose(1, 2)
            dense = pages.flatten(2, 3)[:, :, : self.live]
            key, value = dense.split(self.heads.size, -1)
            self._dense = key.contiguous(), value.contiguous()
        output = scaled_dot_product_attention(
            self.query[:, :, None], *self._dense, scale=self.heads.scale, enable_gqa=True
        )
        return output[:, :, 0]
