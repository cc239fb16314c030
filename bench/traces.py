"""What the ranks of an engine say to each other, from the traces of vLLM's torch profiler."""

from __future__ import annotations

import bisect
import gzip
import json
import re
import statistics
from pathlib import Path
from typing import Any

#: Kernels of vLLM's own collectives and of NCCL.
COLLECTIVE = re.compile(r"cross_device_reduce|nccl|all_?reduce|all_?gather|multimem", re.IGNORECASE)


def options(folder: Path) -> dict[str, Any]:
    """`LLM(profiler_config=...)`: traces go to `folder`."""
    return {
        "profiler": "torch", "torch_profiler_dir": str(folder), "torch_profiler_with_stack": False,
        "torch_profiler_dump_cuda_time_total": False,
    }  # fmt: skip


def collectives(folder: Path, prefix: str) -> tuple[int, float]:
    """Collectives in a step of the model and the seconds that they take, of the traces named
    `prefix`.

    A collective also waits for the other ranks: the time is that of the rank that waits least.
    """
    ranks = [_of_rank(path) for path in sorted(folder.glob(f"{prefix}*.pt.trace.json.gz"))]
    if not ranks:
        raise FileNotFoundError(f"no trace {prefix}* in {folder}")
    counts = {count for count, _ in ranks}
    if len(counts) > 1:
        raise ValueError(f"the ranks differ in collectives a step: {sorted(counts)}")
    return counts.pop(), min(seconds for _, seconds in ranks)


def _of_rank(path: Path) -> tuple[int, float]:
    """Of the usual step; the first and last ones may be cut."""
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    starts = sorted(
        event["ts"] for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith("execute_")
    )  # fmt: skip
    if not starts:
        raise ValueError(f"{path.name} has no step of the model")
    launched = {
        event["args"]["correlation"]: event["ts"] for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event["args"]
    }  # fmt: skip
    steps: list[list[float]] = [[] for _ in starts]
    for event in events:
        if event.get("cat") != "kernel" or not COLLECTIVE.search(event["name"]):
            continue
        # A step's sampling comes after its annotation, and the device lags behind: by the launch.
        launch = launched.get(event["args"]["correlation"])
        if launch is not None and launch >= starts[0]:
            steps[bisect.bisect_right(starts, launch) - 1].append(event["dur"])
    steps = [step for step in steps if step] or [[]]  # an empty step asks the model nothing
    usual = statistics.mode(map(len, steps))
    return usual, 1e-6 * statistics.fmean(sum(s) for s in steps if len(s) == usual)
