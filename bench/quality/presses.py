"""Scoring functions of NVIDIA's library kvpress, called on a streaming cache's tensors.

The package pins an older transformers than vLLM needs, so it is not installed: its wheel lies in
the cache folder (or the folder that EXPRESS_QUALITY_WHEELS names) and only the modules in use are
imported from there.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import types
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .caches import Score, probabilities
from .harness import Heads
from .texts import cache_folder

VERSION = "0.5.5"
#: Query rows that SnapKV looks at: the press's own default.
SNAP_WINDOW = 64


def wheel() -> Path:
    """The library's wheel, downloaded first if need be."""
    folder = Path(os.environ.get("EXPRESS_QUALITY_WHEELS") or cache_folder())
    path = folder / f"kvpress-{VERSION}-py3-none-any.whl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
        done = subprocess.run([*pip, str(folder), f"kvpress=={VERSION}"], text=True,
                              stdout=sys.stderr, stderr=subprocess.PIPE)  # fmt: skip
        if done.returncode or not path.exists():
            raise RuntimeError(f"pip could not download kvpress=={VERSION}:\n{done.stderr}")
    return path


@cache
def press_class(module: str, name: str) -> Any:
    """A class of `kvpress.presses.<module>`.

    The package's own __init__ imports what only other presses need (datasets, peft), so an empty
    module stands in for it.
    """
    if "kvpress" not in sys.modules:
        root = types.ModuleType("kvpress")
        root.__path__ = [f"{wheel()}/kvpress"]
        sys.modules["kvpress"] = root
    return getattr(import_module(f"kvpress.presses.{module}"), name)


class PressScore:
    """A press that looks at keys and values alone; in fp32, since 16 bits would tie scores."""

    wants_weights = False

    def __init__(self, heads: Heads, press: Any) -> None:
        self.heads, self.press = heads, press
        self.module = SimpleNamespace(
            config=heads.config, head_dim=heads.size, rotary_emb=heads.rotary
        )

    def observe(self, query: Tensor, weights: Tensor | None) -> None:
        """Nothing."""

    def score(self, keys: Tensor, values: Tensor, tokens: int) -> Tensor:
        return self.press.score(self.module, None, keys.float(), values.float(), None, {})

    def keep(self, index: Tensor) -> None:
        """Nothing."""


class RandomScore(PressScore):
    """Every eviction tosses its own dice."""

    def score(self, keys: Tensor, values: Tensor, tokens: int) -> Tensor:
        press = copy.copy(self.press)
        press.seed = (self.press.seed << 32) + tokens
        return press.score(self.module, None, keys.float(), values.float(), None, {})


class SnapScore(PressScore):
    """Attention of the last rows, smoothed: the press gets their real weights."""

    def __init__(self, heads: Heads, press: Any) -> None:
        super().__init__(heads, press)
        self.rows: Tensor | None = None

    def observe(self, query: Tensor, weights: Tensor | None) -> None:
        rows = query if self.rows is None else torch.cat([self.rows, query], 2)
        self.rows = rows[:, :, -self.press.window_size :]

    def score(self, keys: Tensor, values: Tensor, tokens: int) -> Tensor:
        assert self.rows is not None
        weights = probabilities(self.rows, keys, self.heads.scale)
        hidden = torch.empty(1, self.press.window_size + 1, 0)  # its length is checked, no more
        return self.press.score(self.module, hidden, keys, values, weights, {})


class ExpectedScore(PressScore):
    """Attention expected from the next queries, modelled on all queries so far.

    In the library the statistics come from a prompt's hidden states, whose length is also the
    position that RoPE continues from.  Here queries stream by: RoPE is undone, their moments are
    summed, and the press's own RoPE average and score see them at the true position.
    """

    def __init__(self, heads: Heads, press: Any) -> None:
        super().__init__(heads, press)
        self.tokens = self.count = 0
        self.first: Tensor | None = None  # sum of queries before RoPE [B, heads, d]
        self.second: Tensor | None = None  # sum of their outer products [B, heads, d, d]

    def observe(self, query: Tensor, weights: Tensor | None) -> None:
        length = query.shape[2]
        rows = unrotated(self.heads, query.float(), self.tokens)
        rows = rows[:, :, max(0, self.press.n_sink - self.tokens) :]  # outliers, as in the library
        first, second = rows.sum(2), torch.einsum("bhli,bhlj->bhij", rows, rows)
        self.first = first if self.first is None else self.first + first
        self.second = second if self.second is None else self.second + second
        self.tokens += length
        self.count += rows.shape[2]

    def statistics(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the queries after the average RoPE of the next positions."""
        assert self.first is not None and self.second is not None
        mean = self.first / self.count
        covariance = self.second / self.count - mean[..., :, None] * mean[..., None, :]
        return self.press.apply_avg_rope(self.module, mean, covariance, tokens)

    def score(self, keys: Tensor, values: Tensor, tokens: int) -> Tensor:
        press = copy.copy(self.press)
        press.get_query_statistics = lambda module, hidden: self.statistics(tokens)
        return press.score(self.module, None, keys.float(), values.float(), None, {})


class SharedScore:
    """One choice for all KV heads of a layer: the mean of their scores."""

    def __init__(self, inner: Score) -> None:
        self.inner, self.wants_weights = inner, inner.wants_weights
        self.observe, self.keep = inner.observe, inner.keep

    def score(self, keys: Tensor, values: Tensor, tokens: int) -> Tensor:
        scores = self.inner.score(keys, values, tokens)
        return scores.mean(1, keepdim=True).expand_as(scores)


class MixedScore:
    """What is best by either of two scores: the better one of an entry's two ranks counts."""

    wants_weights = False

    def __init__(self, first: Score, second: Score) -> None:
        self.parts = first, second

    def observe(self, query: Tensor, weights: Tensor | None) -> None:
        for part in self.parts:
            part.observe(query, weights)

    def score(self, keys: Tensor, values: Tensor, tokens: int) -> Tensor:
        ranks = [
            part.score(keys, values, tokens).float().argsort(-1).argsort(-1) for part in self.parts
        ]
        return torch.maximum(*ranks).float()

    def keep(self, index: Tensor) -> None:
        for part in self.parts:
            part.keep(index)


def unrotated(heads: Heads, query: Tensor, start: int) -> Tensor:
    """Queries [B, heads, L, d] at positions from `start` on, before RoPE."""
    positions = torch.arange(start, start + query.shape[2], device=query.device)[None]
    cos, sin = heads.rotary(query, positions)
    half = heads.size // 2
    turned = torch.cat([query[..., half:], -query[..., :half]], -1)  # the transpose of rotate_half
    norm = cos[:, None] ** 2 + sin[:, None] ** 2  # 1, or a scaling squared
    return (query * cos[:, None] + turned * sin[:, None]) / norm
