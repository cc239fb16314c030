"""A progress bar on standard error with the time that is left, and a deadline for a whole run."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from tqdm import tqdm


class OutOfTime(Exception):
    """The deadline passed: rows that are complete are kept."""


class Progress:
    """One bar; leaving it by OutOfTime is no error."""

    #: Of time.monotonic; None: no deadline.
    deadline: float | None = None
    #: Titles of the bars that ran out of time.
    stopped: list[str] = []  # noqa: RUF012

    def __init__(self, title: str, total: int) -> None:
        self.title = title
        self.bar = tqdm(total=total, desc=title, unit="layer", smoothing=0.05, mininterval=2)

    def step(self) -> None:
        self.bar.update()
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime

    def say(self, what: str) -> None:
        self.bar.set_postfix_str(what, refresh=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:  # fmt: skip
        self.bar.close()
        if kind is OutOfTime:
            self.stopped.append(self.title)
            return True
        return False
