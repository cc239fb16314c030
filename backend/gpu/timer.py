"""Times compactions on the device without waiting for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .. import timing


class CompactionTimer:
    """Reports a span to `timing` in the first step that finds it finished."""

    def __init__(self, device: torch.device) -> None:
        self._enabled = device.type == "cuda"
        self._spans: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def span(self) -> Iterator[None]:
        if not self._enabled:
            yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._spans.append((begin, end))

    def report(self) -> None:
        while self._spans and self._spans[0][1].query():
            begin, end = self._spans.popleft()
            timing.add(begin.elapsed_time(end) / 1000)
