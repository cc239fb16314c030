"""What the experiments share: layers that are replaced, a clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from ..caches import ExactCache
from ..harness import Heads, LayerCache


def last_replaced(heads: Heads, caches: Sequence[LayerCache], count: int) -> list[LayerCache]:
    """Of `caches`, one a layer, only the last `count`; the layers before are exact."""
    exact = heads.layers - count
    return [*(ExactCache(heads) for _ in range(exact)), *caches[exact:]]


def times(
    run: Callable[[], object], device: torch.device, repeats: int = 7, seconds: float = 3.0,
    together: int = 1, warm: bool = True,
) -> list[float]:  # fmt: skip
    """Milliseconds of `run`, each of `together` runs back to back: `repeats` of them, or fewer once
    `seconds` are used up."""
    if warm:
        run()
    found: list[float] = []
    begin = time.monotonic()
    while len(found) < repeats and (not found or time.monotonic() - begin < seconds):
        found.append(_window(run, device, together))
    return found


def _window(run: Callable[[], object], device: torch.device, together: int) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(together):
            run()
        return 1e3 * (time.perf_counter() - begin) / together
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(together):
        run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / together
