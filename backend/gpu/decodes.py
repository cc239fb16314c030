"""What the decode kernels know of a batch, at fixed device addresses.

Between two events a request's slots only shift by a constant against its positions and its
log-weights do not change, so each request has a row that is renewed when an event passes; a step
adds token counts to rows, vectorised, and makes one copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from express_vllm.layout import Layout

from ..kernels.constants import MAX_SEGMENTS
from ..kernels.decode import ring_word, segment_steps
from ..kernels.upload import upload

if TYPE_CHECKING:
    from express_vllm.budget import Budget

#: 32-bit words of a request: live slots, ring row, segment starts and rises.
WORDS = 2 + 2 * MAX_SEGMENTS


def aligned(count: int) -> int:
    return (count + 3) // 4 * 4


def words_of(count: int) -> int:
    return aligned(count) * WORDS


@dataclass
class DecodeTables:
    """Views into the fixed table for a batch of `count` rows (kernels.decode)."""

    count: int
    live: Tensor  # int32 [count]
    ring: Tensor  # int32 [count]
    starts: Tensor  # int32 [count, MAX_SEGMENTS]
    rises: Tensor  # fp32 [count, MAX_SEGMENTS], of log2 weights

    @classmethod
    def of(cls, words: Tensor, count: int) -> DecodeTables:
        """Cut `words`, int32 [words_of(count)].  A graph captured for `count` finds the same views,
        every one of them aligned to 16 bytes."""
        starts, rises, live, ring = words.view(-1, aligned(count)).split(
            [MAX_SEGMENTS] * 2 + [1, 1]
        )
        shape = (-1, MAX_SEGMENTS)
        return cls(
            count, live[0, :count], ring[0, :count], starts.view(shape)[:count],
            rises.view(torch.float32).view(shape)[:count],
        )  # fmt: skip


class DecodeRows:
    """Host rows by Model Runner V2's request index, and the device table, of wide or of ordinary
    layers."""

    def __init__(self, wide: bool, requests: int, device: torch.device) -> None:
        self._wide = wide
        self._device_words = torch.zeros(words_of(requests), dtype=torch.int32, device=device)
        self._names: list[str | None] = [None] * requests
        self._budgets: list[Budget | None] = [None] * requests  # None: never used
        # Valid for positions [event, until): live slots = position + shift.
        self._event, self._until, self._shift, self._ring_from, self._ring_start = np.zeros(
            (5, requests), np.int64
        )
        self._starts = np.zeros((requests, MAX_SEGMENTS), np.int32)
        self._rises = np.zeros((requests, MAX_SEGMENTS), np.float32)

    def update(
        self,
        index: np.ndarray,
        names: Sequence[str],
        budgets: Sequence[Budget],
        positions: np.ndarray,
    ) -> np.ndarray:
        """Renew the rows of requests `index` [D], the first ones of those with `names` and
        `budgets`, whose next tokens are at `positions` [D].

        -> position of each request's last event, that before this token included, int64 [D].
        """
        outside = (positions < self._event[index]) | (positions >= self._until[index])
        for r, i in enumerate(index.tolist()):
            if outside[r] or self._names[i] != names[r] or not same(self._budgets[i], budgets[r]):
                self._names[i], self._budgets[i] = names[r], budgets[r]
                self._renew(i, budgets[r].layout_in(self._wide), int(positions[r]))
        return self._event[index]

    def _renew(self, i: int, layout: Layout, position: int) -> None:
        self._event[i] = layout.last_event_position(position + 1)
        self._until[i] = layout.next_event_position(position + 1)
        self._shift[i] = layout.live(position + 1) - position
        self._ring_from[i] = layout.ring_from(position + 1)
        self._ring_start[i] = layout.ring_start
        self._starts[i], self._rises[i] = segment_steps(layout.segments(position + 1))

    def tables(self, index: np.ndarray, stops: np.ndarray, count: int) -> DecodeTables:
        """Copy the rows of requests `index`, which then hold `stops` tokens; padded to `count`."""
        words = np.zeros(words_of(count), np.int32)
        here = DecodeTables.of(torch.from_numpy(words), count)
        real, positions = len(index), stops - 1
        here.live.numpy()[:real] = positions + self._shift[index]
        row = positions - self._ring_from[index]
        word = ring_word(self._ring_start[index], row)
        here.ring.numpy()[:real] = np.where(row >= 0, word, -1)
        here.starts.numpy()[:real] = self._starts[index]
        here.rises.numpy()[:real] = self._rises[index]
        device_words = self._device_words[: len(words)]
        upload(words, device_words)
        return DecodeTables.of(device_words, count)

    def idle(self, count: int) -> DecodeTables:
        """Rows of a dummy batch: no live slots, so that kernels do nothing."""
        device_words = self._device_words[: words_of(count)]
        return DecodeTables.of(device_words.zero_(), count)


def same(one: Budget | None, other: Budget) -> bool:
    """Whether budgets are equal; mostly they are one object, and comparing fields takes long."""
    return one is other or one == other
