"""Kernel benchmark on one GPU: `python -m bench.kernels` prints one table and stores it as JSON.

Llama-3.1-8B's head shape (32 query heads, 8 KV heads, head size 128), bf16, batch 1.  Causal
prefill attention of a whole prompt, compression included, against torch's FlashAttention 2 and
cuDNN and vLLM's FlashAttention 3 on the same tensors; weighted paged decode against a device copy;
compaction of a decode step.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from express_vllm.backend.chunk import Chunk
from express_vllm.backend.kernels import decode, step
from express_vllm.backend.kernels.step import StepPlan, Tuning
from express_vllm.layout import Layout, layout_for
from express_vllm.shape import Shape, make_shape
from express_vllm.softmax import Softmax

from . import record

HEADS, KV_HEADS, SIZE = 32, 8, 128
GROUP, SCALE, BLOCK = HEADS // KV_HEADS, SIZE**-0.5, 16
SOFTMAX = Softmax(SCALE)
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
#: Columns of the table; a row has a value for each, "-" where it does not apply.
COLUMNS = (
    "what", "kernel", "ms", "one run, ms", "attention alone, ms", "compression's share", "events",
    "us an event", "TFLOP/s", "GB/s", "x FA2", "x cuDNN", "x FA3",
)  # fmt: skip


def row(what: str, kernel: str, ms: float | str, **values: Any) -> dict[str, Any]:
    return {**dict.fromkeys(COLUMNS, "-"), "what": what, "kernel": kernel, "ms": ms, **values}


def milliseconds(
    run: Callable[[], object], repeats: int = 5, warm: bool = True, together: int = 1
) -> float:
    """Median device time of `run` over `repeats` windows of `together` runs back to back.

    A single short run measures how fast the host launches it; layers of a model follow each other.
    """
    if warm:
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(together):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / together)
    return statistics.median(times)


def windows(count: int) -> tuple[int, int]:
    """Windows and runs in each for prompts of `count` tokens, the same for every kernel."""
    if count <= 32_768:
        return 5, 20 if count <= 8_192 else 5
    return (4, 1) if count <= 200_000 else (2, 1) if count <= 600_000 else (1, 1)


def random_tokens(count: int) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(count, HEADS, SIZE, device=DEVICE, dtype=DTYPE)
    key = torch.randn(count, KV_HEADS, SIZE, device=DEVICE, dtype=DTYPE)
    return query, key, torch.randn_like(key)


class Prefill:
    """A prompt's causal attention; events overlap with it on a stream of their own."""

    def __init__(self, layout: Layout, batch: tuple[Tensor, Tensor, Tensor], part: int) -> None:
        self.batch = batch
        count, slots = len(batch[0]), layout.shape.slots
        pages = -(-slots // BLOCK)
        self.cache = torch.randn(pages, KV_HEADS, BLOCK, 2 * SIZE, device=DEVICE).to(DTYPE)
        self.table = torch.randperm(pages, device=DEVICE).int()[None]
        self.output = torch.full_like(batch[0], torch.nan)
        self.side = torch.cuda.Stream(priority=-1)
        self.steps = [
            StepPlan.make([Chunk(layout, s, min(s + part, count), s, 0, 7)], GROUP, DEVICE)
            for s in range(0, count, part)
        ]
        self.events = sum(s.extent.instances for s in self.steps)

    def run(self) -> None:
        for s in self.steps:
            step.run_chunks(
                s, *self.batch, self.cache, self.table, 0, 0, SOFTMAX, self.output, side=self.side
            )

    def compress(self, tuning: Tuning | None = None) -> list[tuple[step.Source, Tensor]]:
        """Everything but attention and the state in the pages."""
        query, key, value = self.batch
        states = []
        for s in self.steps:
            source = step.chunk_source(s, key, value, self.cache, self.table)
            if not s.kind:
                states.append((source, step.identity_lists(s)))
                continue
            scores = step.score_recent(s, query, self.cache, source, 1, SOFTMAX, GROUP)
            model = step.Model.of(self.cache, GROUP)
            lists, _ = step.compact(
                s, scores, source, KV_HEADS, model, s.zero, 0, SOFTMAX, tuning=tuning
            )
            states.append((source, lists))
        return states

    def attend(self, states: list[tuple[step.Source, Tensor]]) -> None:
        for s, (source, lists) in zip(self.steps, states, strict=True):
            step.attend_chunks(s, self.batch[0], source, lists, KV_HEADS, SOFTMAX, self.output)


def sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], object]:
    def run(query: Tensor, key: Tensor, value: Tensor) -> object:
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            )

    return run


def flash_attention_3() -> Callable[[Tensor, Tensor, Tensor], object]:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    def run(query: Tensor, key: Tensor, value: Tensor) -> object:
        ends = torch.tensor([0, len(query)], dtype=torch.int32, device=DEVICE)
        return flash_attn_varlen_func(
            query, key, value, max_seqlen_q=len(query), cu_seqlens_q=ends,
            max_seqlen_k=len(query), cu_seqlens_k=ends, softmax_scale=SCALE, causal=True,
            fa_version=3,
        )  # fmt: skip

    return run


def exact_rows(batch: tuple[Tensor, Tensor, Tensor]) -> list[dict]:
    """Exact causal attention by others' kernels; "-" and the reason where one is missing."""
    count = len(batch[0])
    repeats, together = windows(count)
    kernels: dict[str, Callable[[], Callable]] = {
        "FA2": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
        "cuDNN": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
        "FA3": flash_attention_3,
    }
    rows = []
    for name, make in kernels.items():
        try:
            run = make()
            time_ms: float | str = milliseconds(
                lambda r=run: r(*batch), repeats, count <= 200_000, together
            )
        except (ImportError, RuntimeError) as reason:
            print(f"no {name} at {count} tokens: {str(reason).splitlines()[0]}", flush=True)
            time_ms = "-"
        rows.append(row(f"prefill {count}", name, time_ms))
    return rows


def express_row(
    batch: tuple[Tensor, Tensor, Tensor], shape: Shape, name: str, part: int | None,
    exact: dict[str, float | str],
) -> dict:  # fmt: skip
    count, layout = len(batch[0]), layout_for(shape)
    prefill = Prefill(layout, batch, part or count)
    repeats, together = windows(count)
    total = milliseconds(prefill.run, max(repeats, 3), together=together)
    single = milliseconds(prefill.run, 5 if together > 1 else 1, warm=False)
    assert bool(prefill.output.isfinite().all()), "an output was not written"
    states = prefill.compress()
    alone = milliseconds(lambda: prefill.attend(states), 3, warm=False, together=together)
    apart = milliseconds(prefill.compress, 3, warm=False, together=together)
    attended = sum(layout.live(n + 1) for n in range(count))
    return row(
        f"prefill {count}", name, total,
        **{
            "one run, ms": single, "attention alone, ms": alone,
            "compression's share": max(0.0, 1 - alone / total),
            "events": prefill.events, "us an event": 1e3 * apart / max(prefill.events, 1),
            "TFLOP/s": 4e-9 * attended * SIZE * HEADS / alone,
        },
        **{
            f"x {kernel}": time_ms / total
            for kernel, time_ms in exact.items()
            if isinstance(time_ms, float)
        },
    )  # fmt: skip


def copy_bandwidth() -> float:
    """GB/s that a large device copy moves, read and written bytes counted."""
    source = torch.randn(2**29, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e6


def decode_rows(requests: int, live: int) -> list[dict]:
    bandwidth = copy_bandwidth()
    pages = live // BLOCK
    cache = torch.randn(requests * pages, KV_HEADS, BLOCK, 2 * SIZE, device=DEVICE, dtype=DTYPE)
    table = torch.randperm(requests * pages, device=DEVICE).int().view(requests, pages)
    layout = layout_for(make_shape(live + BLOCK))
    tokens = next(n for n in range(20_000, 40_000) if layout.live(n) == live)
    starts, steps = (
        torch.from_numpy(x).to(DEVICE).expand(requests, -1).contiguous()
        for x in decode.segment_steps(layout.segments(tokens))
    )
    lengths = torch.full((requests,), live, dtype=torch.int32, device=DEVICE)
    query = torch.randn(requests, HEADS, SIZE, device=DEVICE, dtype=DTYPE)
    output = torch.full_like(query, torch.nan)
    scratch = decode.DecodeScratch(requests, HEADS, SIZE, live, DEVICE)

    def run() -> None:
        decode.decode_attention(
            query, cache, table, lengths, starts, steps, SOFTMAX, scratch, output
        )

    time_ms = milliseconds(run, 10)
    return [
        row("device copy", "torch", "-", **{"GB/s": bandwidth}),
        row(
            f"decode {requests} x {live}", "Express", time_ms,
            **{"GB/s": cache.nbytes / time_ms / 1e6},
        ),
    ]  # fmt: skip


def compaction_rows(slots: int, requests: int, layers: int) -> list[dict]:
    """One decode step in which every request has an event, and its part of an average step."""
    layout = layout_for(make_shape(slots))
    pages = -(-slots // BLOCK)
    cache = torch.randn(
        layers, requests * pages, KV_HEADS, BLOCK, 2 * SIZE, device=DEVICE, dtype=DTYPE
    )
    table = torch.randperm(requests * pages, device=DEVICE).int().view(requests, pages)
    offsets = torch.arange(layers, device=DEVICE) * cache[0].numel()
    position = layout.event(40).position
    plan = StepPlan.make(
        [Chunk(layout, position, position + 1, 0, r, r) for r in range(requests)], GROUP, DEVICE,
        compacting=True,
    )  # fmt: skip
    ids = torch.arange(layers, device=DEVICE)

    def run() -> None:
        step.compact_pages(plan, cache[0], offsets, ids, table, 0, SOFTMAX, GROUP)

    time_ms = milliseconds(run, 3)
    what = f"compaction {requests} requests x {layers} layers"
    interval = layout.shape.interval
    return [
        row(what, f"Express {slots}", time_ms),
        row(f"{what}, per step of {interval}", f"Express {slots}", time_ms / interval),
    ]


def event_rows(count: int, shape: Shape, ways: list[tuple[int, int]]) -> list[dict]:
    """Microseconds an event for each way (team, warps) to share it out."""
    prefill = Prefill(layout_for(shape), random_tokens(count), count)
    found = []
    for team, warps in ways:
        tuning = Tuning(team=team, warps=warps)
        time_ms = milliseconds(lambda t=tuning: prefill.compress(t), 3)
        found.append(
            row(
                f"events {count}", f"{shape.slots} team {team} warps {warps}", time_ms,
                events=prefill.events, **{"us an event": 1e3 * time_ms / prefill.events},
            )
        )  # fmt: skip
    return found


def shown(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 1000
        else (f"{value:.0f}" if isinstance(value, float) else str(value))
    )


def case(text: str) -> tuple[str, Shape]:
    """schedule:slots or schedule:slots:interval -> its name and shape."""
    schedule, slots, *interval = text.split(":")
    shape = make_shape(
        int(slots), schedule=schedule, interval=int(interval[0]) if interval else None
    )
    return f"Express {' '.join(text.split(':'))}", shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="8192,32768,131072,524288,1048576")
    parser.add_argument(
        "--cases", default="lazy:1024,lazy:2048,lazy:4096,paper:2048",
        help="schedule:slots[:interval], ...",
    )  # fmt: skip
    parser.add_argument("--paper-up-to", type=int, default=131072, help="tokens")
    parser.add_argument("--only", default="decode,compaction,prefill", help="and events")
    parser.add_argument("--teams", default="1x8,4x8", help="programs x warps of `events`")
    parser.add_argument("--part", type=int, help="tokens of a part, if not the whole prompt")
    parser.add_argument("--no-exact", action="store_true", help="only Express's own rows")
    parser.add_argument("--name", default="kernels", help="of the file in bench/results/speed/")
    options = parser.parse_args()
    torch.manual_seed(0)
    wanted = options.only.split(",")
    cases = [case(text) for text in options.cases.split(",")]
    rows: list[dict] = []

    def add(new: list[dict]) -> list[dict]:
        for found in new:
            print(*(shown(found[name]) for name in COLUMNS), sep=" | ", flush=True)
        rows.extend(new)
        torch.cuda.empty_cache()
        return new

    print(*COLUMNS, sep=" | ")
    if "events" in wanted:
        ways = [way.split("x") for way in options.teams.split(",")]
        add(event_rows(32768, cases[0][1], [(int(team), int(warps)) for team, warps in ways]))
    if "decode" in wanted:
        add(decode_rows(256, 2048))
    if "compaction" in wanted:
        add(compaction_rows(2048, 64, 32))
    for count in map(int, options.lengths.split(",") if "prefill" in wanted else ()):
        batch = random_tokens(count)
        exact = [] if options.no_exact else add(exact_rows(batch))
        times = {found["kernel"]: found["ms"] for found in exact}
        for name, shape in cases:
            if shape.schedule == "paper" and count > options.paper_up_to:
                continue
            add([express_row(batch, shape, name, options.part, times)])
        del batch
    print()
    print(record.table([{k: shown(v) for k, v in found.items()} for found in rows]))
    print(record.save(f"speed/{options.name}", rows))


if __name__ == "__main__":
    main()
