"""Caches that are compressed once, after the prompt, and what follows scored.

The prompt runs with exact or with Express attention while all keys and values are kept; then each
method keeps its share, at an equal number of slots when the last token is scored: what the
continuation adds is taken off beforehand.  Express alone goes on with the cache it has.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import presses, recall
from ..caches import ExactCache, attend, joined
from ..harness import Heads, LayerCache, Stream, log_probabilities
from ..methods.eviction import SINKS
from ..policies import Policy
from ..progress import Progress
from ..run import Result, Rows, Run

FILE = "paper/compress"
SPLIT = "report"
BATCH = 16
FULL = {"length": 7680, "continuation": 256, "slots": [1024], "depths": [0.1, 0.5, 0.9]}
SMALL = {"length": 768, "continuation": 64, "slots": [256], "documents": 3, "depths": [0.5]}
#: `itself`: the cache that the prompt left goes on; `full`: every token of the prompt is kept.
METHODS = ("full", "snapkv", "streaming", "pyramid")
PREFILLS = ("exact", "express")
#: PyramidKV (arXiv 2406.02069): the last layer gets the mean's BETA-th part, but its window.
BETA = 20


def measure(run: Run) -> Result:
    rows = continuations(run)
    for task in recall.TASKS:
        rows += recalls(run, task)
    used = {"slots": run.options.slots, "continuation": run.options.continuation}
    return rows, used


class OnceCache:
    """A layer that keeps the prompt's keys and values beside the cache that attends to them."""

    def __init__(self, heads: Heads, layer: int, inner: LayerCache, window: int) -> None:
        self.heads, self.layer, self.window = heads, layer, window
        self.inner: LayerCache | None = inner
        press = presses.press_class("snapkv_press", "SnapKVPress")
        self.score = presses.SnapScore(heads, press(window_size=window))
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.compressed = False
        #: Slots in use after the prompt; the prompt's own cache is not counted.
        self.peak = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.compressed and self.inner is not None:
            output = self.inner.attend(query, key, value)
            self.peak = self.inner.peak
            return output
        self.keys, self.values = joined(self.keys, key), joined(self.values, value)
        self.peak = self.keys.shape[2]
        if self.inner is None:
            return attend(query, self.keys, self.values, self.heads.scale, None)
        self.score.observe(query, None)
        return self.inner.attend(query, key, value)

    def compress(self, method: str, slots: int) -> None:
        """The prompt is over: `method` chooses what stays, `slots` a layer on average."""
        assert self.keys is not None and self.values is not None
        self.compressed = True
        if method == "itself":
            assert self.inner is not None
            self.keys, self.values, self.peak = None, None, self.inner.peak
            return
        self.inner = None
        if method != "full":
            index = self._kept(method, slots)
            wide = index[..., None].expand(-1, -1, -1, self.keys.shape[-1])
            self.keys, self.values = self.keys.gather(2, wide), self.values.gather(2, wide)
        self.peak = self.keys.shape[2]

    def _kept(self, method: str, slots: int) -> Tensor:
        """Indices of the entries that stay, int64 [B, KV heads, K], in order."""
        assert self.keys is not None and self.values is not None
        batch, heads, count, _ = self.keys.shape
        if method == "streaming":
            slot = torch.arange(count, device=self.keys.device)
            stay = slot[(slot < SINKS) | (slot >= count - (slots - SINKS))]
            return stay.expand(batch, heads, -1)
        if method == "pyramid":
            slots = pyramid(slots, self.heads.layers, self.window, count)[self.layer]
        scores = self.score.score(self.keys, self.values, count)
        return scores.topk(min(slots, count), -1).indices.sort(-1).values

    def fork(self) -> OnceCache:
        twin = copy.copy(self)
        twin.score = copy.copy(self.score)
        twin.inner = self.inner.fork() if self.inner is not None else None
        return twin


def pyramid(slots: int, layers: int, window: int, most: int) -> list[int]:
    """Budgets of the layers: linear from the first, the largest, to the last, `slots` on average.

    The last layer has slots / BETA but room for its window and a token, the first at most `most`.
    """
    slots = min(slots, most)
    low = max(slots / BETA, window + 1, 2 * slots - most)
    if low > slots:
        raise ValueError(f"{slots} slots do not hold a window of {window} tokens in every layer")
    high = 2 * slots - low
    step = (high - low) / max(1, layers - 1)
    exact = [high - layer * step for layer in range(layers)]
    found = [int(x) for x in exact]
    # What rounding down leaves goes where it took most, so that no layer is off by a whole slot.
    order = sorted(range(layers), key=lambda layer: found[layer] - exact[layer])
    for layer in order[: slots * layers - sum(found)]:
        found[layer] += 1
    return found


class Prefilled(Stream):
    """A stream whose prompt has already run: feeding it gives the stored states."""

    hidden: Tensor | None = None

    @classmethod
    def of(cls, stream: Stream, hidden: Tensor, method: str, slots: int) -> Prefilled:
        twin = cls(stream.model, stream.fork().caches, tick=stream.tick)
        twin.tokens, twin.hidden = stream.tokens, hidden
        for cache in twin.caches:
            assert isinstance(cache, OnceCache)
            cache.compress(method, slots)
        return twin

    def feed(self, ids: Tensor, chunk: int = 1 << 30) -> Tensor:
        if self.hidden is None:
            return super().feed(ids, chunk)
        hidden, self.hidden = self.hidden, None
        return hidden


def window_of(slots: int) -> int:
    return min(presses.SNAP_WINDOW, slots // 4)


def prefilled(run: Run, prefill: str, slots: int, ids: Tensor, progress: Progress) -> Any:
    """The prompt ids [B, L] through the model -> (stream, hidden states [B, L, D])."""
    heads = run.heads
    inner: Sequence[LayerCache] = [ExactCache(heads) for _ in range(heads.layers)]
    if prefill == "express":
        inner = Policy.parse("express", slots).caches(heads, run.options.seeds[0])
    window = window_of(slots)
    caches = [OnceCache(heads, layer, cache, window) for layer, cache in enumerate(inner)]
    stream = Stream(run.model, caches, tick=progress.step)
    return stream, stream.feed(ids, run.options.chunk)


def methods(prefill: str) -> tuple[str, ...]:
    """Express alone is its prefill's cache going on."""
    return (*METHODS, "itself") if prefill == "express" else METHODS


def continuations(run: Run) -> Rows:
    """NLL of the continuation: a row per slots, prefill, method and document."""
    options = run.options
    stop, more = options.length, options.continuation
    groups = list(run.batches(stop + more))
    rows: Rows = []
    a_group = run.heads.layers * (2 * -(-stop // options.chunk) + 2 * len(METHODS) + 1)
    with Progress("continuations", len(options.slots) * len(groups) * a_group) as progress:
        for slots in options.slots:
            for names, ids in groups:
                for prefill in PREFILLS:
                    stream, hidden = prefilled(run, prefill, slots, ids[:, :stop], progress)
                    for method in methods(prefill):
                        progress.say(f"{prefill} {method} {slots}")
                        twin = Prefilled.of(stream, hidden, method, slots - more)
                        found = continued(run, twin, ids, stop)
                        rows += _rows("nll", slots, prefill, method, twin, names,
                                      [{"nll": round(-x, 5)} for x in found])  # fmt: skip
    return rows


def continued(run: Run, stream: Stream, ids: Tensor, stop: int) -> list[float]:
    """Mean log-probability of the tokens from `stop` on, of each row of ids [B, L]."""
    hidden = stream.feed(ids[:, :stop])[:, -1:]
    hidden = torch.cat([hidden, stream.feed(ids[:, stop:-1])], 1)
    found, _ = log_probabilities(run.model, hidden, ids[:, stop:])
    return [float(x) for x in found.double().mean(1)]


def recalls(run: Run, task: str) -> Rows:
    """Needles and key-value pairs: a row per slots, prefill, method, depth and document."""
    options, names = run.options, list(run.documents)
    room = max(len(run.tokenize(f" {'9' * recall.DIGITS}")), 1)
    groups = [names[at : at + options.batch] for at in range(0, len(names), options.batch)]
    # A prompt and the eight answers of every method.
    answers = (1 + recall.DISTRACTORS) * (2 * len(METHODS) + 1)
    a_group = run.heads.layers * (2 * -(-options.length // options.chunk) + answers)
    total = a_group * len(groups) * len(options.slots) * len(options.depths)
    rows: Rows = []
    with Progress(task, total) as progress:
        for slots in options.slots:
            for depth in options.depths:
                for group in groups:
                    cases = [
                        recall.TASKS[task](run.tokenize, run.documents[n], options.length, depth,
                                           names.index(n))
                        for n in group
                    ]  # fmt: skip
                    prompts = torch.tensor([c.prompt for c in cases], device=run.model.device)
                    for prefill in PREFILLS:
                        stream, hidden = prefilled(run, prefill, slots, prompts, progress)
                        for method in methods(prefill):
                            progress.say(f"{prefill} {method} {depth}")
                            twin = Prefilled.of(stream, hidden, method, slots - room)
                            found = recall.answer(twin, run.model, cases, options.chunk)
                            more = [{"depth": depth, **x} for x in found]
                            rows += _rows(task, slots, prefill, method, twin, group, more)
    return rows


def _rows(
    what: str, slots: int, prefill: str, method: str, stream: Stream, names: Sequence[str],
    values: Sequence[dict[str, Any]],
) -> Rows:  # fmt: skip
    used = [cache.peak for cache in stream.caches]
    mean = round(sum(used) / len(used), 2)
    return [
        {"what": what, "slots": slots, "prefill": prefill, "method": method, "document": name,
         "used": mean, **value}
        for name, value in zip(names, values, strict=True)
    ]  # fmt: skip
