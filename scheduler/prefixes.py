"""Who shares a beginning with whom, and where in a prompt states are worth a copy.

The blocks of a bounded request are rewritten as it goes on, so that a beginning which several
prompts share is lost unless a state is copied where they part.  `Prefixes` remembers the chained
hashes of prompts that came; a prompt that shares more with them than with any state has a *mark*
there, and so has the one it shares with, while that has not come past it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

#: Tokens that a state must save: fewer are computed in about the time of a step of their own.
LEAST_GAIN = 512
#: Block hashes that are remembered: some 110 bytes each if a prompt has a hundred of them, three
#: times as much if it has one.
MOST_HASHES = 1 << 18


@dataclass
class Marks:
    """Token counts at which a request's state is to be copied, and after which it last was."""

    due: set[int] = field(default_factory=set)
    last: int = 0
    #: The request that makes a state which this one wants, and at how many tokens.
    maker: str = ""
    wanted: int = 0

    def add(self, tokens: int) -> int:
        """Ask for a state at `tokens`; -> where there will be one, at most LEAST_GAIN before."""
        near = [t for t in self.due if tokens - LEAST_GAIN < t <= tokens]
        if near:
            return max(near)
        self.due.add(tokens)
        return tokens

    def next(self, tokens: int) -> int | None:
        """The first mark after `tokens`."""
        return min((t for t in self.due if t > tokens), default=None)

    def passed(self, tokens: int) -> bool:
        """The request has come to `tokens`; -> whether its state is worth a copy just now."""
        here = tokens in self.due and tokens - self.last >= LEAST_GAIN
        self.due = {t for t in self.due if t > tokens}
        if here:
            self.last = tokens
        return here


class Prefixes:
    """Hashes of the whole blocks of prompts -> what they are shared as, and by which request."""

    def __init__(self) -> None:
        self._seen: dict[Any, tuple[Any, str]] = {}

    def shared(self, kind: Any, hashes: Sequence[Any]) -> tuple[int, str]:
        """How many leading blocks a prompt of a kind shares with earlier ones, and with which.

        Hashes are chained: whoever has one has those before it.
        """
        low, high, owner = 0, len(hashes), ""
        while low < high:
            middle = (low + high + 1) // 2
            found = self._seen.get(hashes[middle - 1])
            if found is not None and found[0] == kind:
                low, owner = middle, found[1]
            else:
                high = middle - 1
        return low, owner

    def add(self, kind: Any, hashes: Sequence[Any], name: str) -> None:
        """Remember a prompt's hashes as those of request `name`."""
        entry = (kind, name)
        for value in hashes:
            self._seen.pop(value, None)  # to the end of the order
            self._seen[value] = entry
        # Many at once: a dictionary finds its first entry by passing over all that were deleted.
        while len(self._seen) > MOST_HASHES:
            for value in list(islice(self._seen, MOST_HASHES // 16)):
                del self._seen[value]
