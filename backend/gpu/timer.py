"""Times compactions on the device without waiting for it.

A chunk's events run while attention fills the other multiprocessors, so their seconds overlap with
its.
"""

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
        self._idle: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def span(self, ends_on: torch.cuda.Stream | None = None) -> Iterator[None]:
        """Time what is launched inside, from the current stream on to `ends_on`."""
        if not self._enabled:
            yield
            return
        begin, end = self._idle.pop() if self._idle else (_event(), _event())
        begin.record()
        yield
        end.record(ends_on or torch.cuda.current_stream())
        self._spans.append((begin, end))

    def report(self) -> None:
        while self._spans and self._spans[0][1].query():
            begin, end = self._spans.popleft()
            timing.add(begin.elapsed_time(end) / 1000)
            self._idle.append((begin, end))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
