"""Kernel benchmark on one GPU: `python -m bench.kernels` prints one table and stores it as JSON.

Llama-3.1-8B's head shape (32 query heads, 8 KV heads, head size 128), bf16, batch 1.  Causal
prefill attention of a whole prompt, compression included, against torch's FlashAttention 2 and
cuDNN on the same tensors; weighted paged decode against a device copy; compaction of a decode step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from express_vllm.backend.kernels import decode, step
from express_vllm.backend.kernels.step import Chunk, StepPlan, Tuning
from express_vllm.layout import Layout, layout_for, make_shape

HEADS, KV_HEADS, SIZE = 32, 8, 128
GROUP, SCALE, BLOCK = HEADS // KV_HEADS, SIZE**-0.5, 16
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16


def milliseconds(run: Callable[[], object], repeats: int = 5, warm: bool = True) -> float:
    """Median device time of `run`, each run timed with events."""
    if warm:
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def random_tokens(count: int) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(count, HEADS, SIZE, device=DEVICE, dtype=DTYPE)
    key = torch.randn(count, KV_HEADS, SIZE, device=DEVICE, dtype=DTYPE)
    return query, key, torch.randn_like(key)


class Prefill:
    """A prompt's causal attention, cut into parts whose events overlap with attention."""

    def __init__(self, layout: Layout, batch: tuple[Tensor, Tensor, Tensor], part: int) -> None:
        self.batch = batch
        count, slots = len(batch[0]), layout.shape.slots
        pages = -(-slots // BLOCK)
        self.cache = torch.randn(pages, KV_HEADS, BLOCK, 2 * SIZE, device=DEVICE).to(DTYPE)
        self.table = torch.randperm(pages, device=DEVICE).int()[None]
        self.output = torch.full_like(batch[0], torch.nan)
        self.side = torch.cuda.Stream(priority=-1)
        self.steps = [
            StepPlan.make(layout, [Chunk(s, min(s + part, count), s, 0, 7)], GROUP, DEVICE)
            for s in range(0, count, part)
        ]

    def arguments(self) -> tuple:
        return *self.batch, self.cache, self.table, 0, 0, SCALE

    def run(self) -> None:
        step.run_pipelined(self.steps, *self.arguments(), self.output, self.side)

    def compress(self) -> list:
        return [step.advance(s, *self.arguments()) for s in self.steps]

    def attend(self, states: list) -> None:
        for s, (source, lists) in zip(self.steps, states, strict=True):
            step.attend_chunks(s, self.batch[0], source, lists, SCALE, self.output)


def part_length(count: int) -> int:
    return 4096 if count <= 8192 else 8192


def exact_attention(batch: tuple[Tensor, Tensor, Tensor], backend: SDPBackend) -> float:
    """Milliseconds of torch's causal attention on K and V repeated for each query head."""
    query, key, value = (x.transpose(0, 1)[None] for x in batch)
    with sdpa_kernel(backend):
        return milliseconds(
            lambda: torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            ),
            2 if len(batch[0]) > 200_000 else 4,
        )


def prefill_rows(count: int, cases: list[tuple[str, int]], part: int | None) -> list[dict]:
    rows = []
    batch = random_tokens(count)
    base = {}
    for name, backend in (
        ("FA2", SDPBackend.FLASH_ATTENTION),
        ("cuDNN", SDPBackend.CUDNN_ATTENTION),
    ):
        base[name] = exact_attention(batch, backend)
        rows.append({"what": f"prefill {count}", "kernel": name, "ms": base[name]})
    for schedule, slots in cases:
        layout = layout_for(make_shape(slots, schedule=schedule))
        prefill = Prefill(layout, batch, part or part_length(count))
        total = milliseconds(prefill.run, 3)
        assert bool(prefill.output.isfinite().all()), "an output was not written"
        states = prefill.compress()
        alone = milliseconds(lambda p=prefill, s=states: p.attend(s), 3, warm=False)
        apart = milliseconds(prefill.compress, 3, warm=False)
        events = sum(s.events for s in prefill.steps)
        attended = sum(layout.live(n + 1) for n in range(count))
        rows.append(
            {
                "what": f"prefill {count}", "kernel": f"Express {schedule} {slots}",
                "ms": total, "attention_ms": alone, "compression_ms": apart,
                "compression_share": max(0.0, 1 - alone / total), "events": events,
                "us_per_event": 1e3 * apart / max(events, 1),
                "attention_tflops": 4e-9 * attended * SIZE * HEADS / alone,
                "against_FA2": base["FA2"] / total, "against_cuDNN": base["cuDNN"] / total,
            }
        )  # fmt: skip
        del prefill, states
    del batch
    torch.cuda.empty_cache()
    return rows


def copy_bandwidth() -> float:
    """GB/s that a large device copy moves, read and written bytes counted."""
    source = torch.randn(2**29, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e6


def decode_row(requests: int, live: int) -> dict:
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
        decode.decode_attention(query, cache, table, lengths, starts, steps, SCALE, scratch, output)

    time_ms = milliseconds(run, 10)
    rate = cache.nbytes / time_ms / 1e6
    return {
        "what": f"decode {requests} x {live}", "kernel": "Express", "ms": time_ms, "GB/s": rate,
        "copy_GB/s": bandwidth, "of_copy": rate / bandwidth,
    }  # fmt: skip


def compaction_row(slots: int, requests: int, layers: int) -> dict:
    """One decode step in which every request has an event, and its share of an average step."""
    layout = layout_for(make_shape(slots))
    pages = -(-slots // BLOCK)
    cache = torch.randn(
        layers, requests * pages, KV_HEADS, BLOCK, 2 * SIZE, device=DEVICE, dtype=DTYPE
    )
    table = torch.randperm(requests * pages, device=DEVICE).int().view(requests, pages)
    offsets = torch.arange(layers, device=DEVICE) * cache[0].numel()
    position = layout.event(40).position
    plan = StepPlan.make(
        layout, [Chunk(position, position + 1, 0, r, r) for r in range(requests)], GROUP, DEVICE,
        compacting=True,
    )  # fmt: skip
    ids = torch.arange(layers, device=DEVICE)

    def run() -> None:
        step.compact_pages(plan, cache[0], offsets, ids, table, 0, SCALE, GROUP)

    time_ms = milliseconds(run, 3)
    return {
        "what": f"compaction {requests} requests x {layers} layers", "kernel": f"Express {slots}",
        "ms": time_ms, "ms_per_step": time_ms / layout.shape.interval,
    }  # fmt: skip


def event_rows(count: int, slots: int, ways: list[tuple[int, int]]) -> list[dict]:
    """Microseconds an event for each way (team, warps) to share it out."""
    layout = layout_for(make_shape(slots))
    batch = random_tokens(count)
    prefill = Prefill(layout, batch, count)
    plan = prefill.steps[0]
    query, key, value = batch
    source = step.chunk_source(plan, key, value, prefill.cache, prefill.table)
    zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    rows = step.query_rows(plan, query, prefill.cache, zero, prefill.table, GROUP)
    found = []
    for team, warps in ways:
        tuning = Tuning(team=team, warps=warps)
        time_ms = milliseconds(
            lambda t=tuning: step.compact(plan, rows, source, zero, 0, SCALE, 0, t), 3
        )
        found.append(
            {
                "what": f"events {count}", "kernel": f"{slots} team {team} warps {warps}",
                "ms": time_ms, "us_per_event": 1e3 * time_ms / plan.events,
            }
        )  # fmt: skip
    return found


def show(row: dict) -> str:
    rest = ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
        if name not in ("what", "kernel", "ms")
    )
    return f"{row['what']:34} {row['kernel']:24} {row['ms']:9.3f} ms  {rest}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="8192,32768,131072,524288")
    parser.add_argument("--cases", default="lazy:1024,lazy:2048,lazy:4096")
    parser.add_argument("--only", default="prefill,decode,compaction,events")
    parser.add_argument("--teams", default="1x8,4x8", help="programs x warps of `events`")
    parser.add_argument("--part", type=int, help="tokens of a part whose events run ahead")
    parser.add_argument("--json", default="bench/results/kernels.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    wanted = options.only.split(",")
    cases = [(s, int(n)) for s, n in (case.split(":") for case in options.cases.split(","))]
    rows: list[dict] = []

    def add(new: list[dict]) -> None:
        for row in new:
            print(show(row), flush=True)
        rows.extend(new)

    if "events" in wanted:
        ways = [way.split("x") for way in options.teams.split(",")]
        add(event_rows(32768, 2048, [(int(team), int(warps)) for team, warps in ways]))
    if "decode" in wanted:
        add([decode_row(256, 2048)])
        torch.cuda.empty_cache()
    if "compaction" in wanted:
        add([compaction_row(2048, 64, 32)])
        torch.cuda.empty_cache()
    if "prefill" in wanted:
        for count in options.lengths.split(","):
            add(prefill_rows(int(count), cases, options.part))
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "command": " ".join(["python -m bench.kernels", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    path = Path(options.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
