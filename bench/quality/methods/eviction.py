"""Methods that forget: a token is kept with weight 1 or not at all.

Those that score evict as we compact: exact until the slots are in use, then before every
`interval`-th token the entries with the lowest scores leave.  `sinks` first and `recent` latest
tokens always stay; with `shared` the KV heads of a layer keep the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .. import presses
from ..caches import Accumulated, EvictingCache, ExactCache, Score, WindowCache
from ..harness import Heads
from .base import Layered, Maker, Method, Size

SINKS = 4


@dataclass(frozen=True, kw_only=True)
class Exact(Method):
    """Every token stays."""

    name: ClassVar[str] = "exact"
    title: ClassVar[str] = "exact"

    def maker(self, heads: Heads, slots: int, seed: int) -> Maker:
        return lambda layer: ExactCache(heads)


@dataclass(frozen=True, kw_only=True)
class Streaming(Layered):
    """StreamingLLM (https://arxiv.org/abs/2309.17453): the sinks and the latest tokens; one leaves
    as the next one enters."""

    name: ClassVar[str] = "streaming"
    title: ClassVar[str] = "StreamingLLM"

    sinks: Size = SINKS

    def maker(self, heads: Heads, slots: int, seed: int) -> Maker:
        return lambda layer: WindowCache(heads, slots, self.sinks)


@dataclass(frozen=True, kw_only=True)
class Scored(Layered):
    """Eviction by a score.  None: `interval` as ours has it, `recent` by the method's share."""

    #: Share of the slots that holds recent tokens for sure: a quarter as in our default.
    share: ClassVar[float] = 0.25

    interval: Size | None = None
    sinks: Size = SINKS
    recent: Size | None = None
    shared: bool = False

    def score(self, heads: Heads, slots: int, seed: int) -> Score:
        raise NotImplementedError

    def maker(self, heads: Heads, slots: int, seed: int) -> Maker:
        interval = self.interval if self.interval is not None else self.shape(slots).interval
        recent = int(self.share * slots) if self.recent is None else self.recent
        recent = min(recent, slots - interval - self.sinks)

        def make(layer: int) -> EvictingCache:
            score = self.score(heads, slots, 1000 * seed + layer)
            score = presses.SharedScore(score) if self.shared else score
            return EvictingCache(heads, slots, interval, self.sinks, recent, score)

        return make


@dataclass(frozen=True, kw_only=True)
class SnapKV(Scored):
    """SnapKV (https://arxiv.org/abs/2404.14469): attention of the last queries, smoothed.  Its
    press protects its own window of queries."""

    name: ClassVar[str] = "snapkv"
    title: ClassVar[str] = "SnapKV-style"
    share: ClassVar[float] = 0.0

    def score(self, heads: Heads, slots: int, seed: int) -> Score:
        press = presses.press_class("snapkv_press", "SnapKVPress")
        return presses.SnapScore(heads, press(window_size=min(presses.SNAP_WINDOW, slots // 4)))


@dataclass(frozen=True, kw_only=True)
class KNorm(Scored):
    """L2 norms of keys (https://arxiv.org/abs/2406.11430): small ones stay."""

    name: ClassVar[str] = "knorm"
    title: ClassVar[str] = "KNorm"

    def score(self, heads: Heads, slots: int, seed: int) -> Score:
        return presses.PressScore(heads, presses.press_class("knorm_press", "KnormPress")())


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Scored):
    """KeyDiff (https://arxiv.org/abs/2504.15364): keys that differ most from their mean stay."""

    name: ClassVar[str] = "keydiff"
    title: ClassVar[str] = "KeyDiff"

    def score(self, heads: Heads, slots: int, seed: int) -> Score:
        return presses.PressScore(heads, presses.press_class("keydiff_press", "KeyDiffPress")())


@dataclass(frozen=True, kw_only=True)
class Expected(Scored):
    """Expected attention (https://arxiv.org/abs/2510.00636): attention of the queries to come, as
    a normal distribution of those so far predicts them."""

    name: ClassVar[str] = "expected"
    title: ClassVar[str] = "expected attention"

    def score(self, heads: Heads, slots: int, seed: int) -> Score:
        press = presses.press_class("expected_attention_press", "ExpectedAttentionPress")
        return presses.ExpectedScore(heads, press())


@dataclass(frozen=True, kw_only=True)
class H2O(Scored):
    """Heavy-hitter oracle (https://arxiv.org/abs/2306.14048): attention received so far.  Half of
    the slots is recent, as in the paper."""

    name: ClassVar[str] = "h2o"
    title: ClassVar[str] = "H2O-style"
    share: ClassVar[float] = 0.5

    def score(self, heads: Heads, slots: int, seed: int) -> Score:
        return Accumulated(heads)


@dataclass(frozen=True, kw_only=True)
class Random(Scored):
    """Dice: what eviction loses without looking at anything."""

    name: ClassVar[str] = "random"
    title: ClassVar[str] = "random eviction"
    seeded: ClassVar[bool] = True

    def score(self, heads: Heads, slots: int, seed: int) -> Score:
        press = presses.press_class("random_press", "RandomPress")
        return presses.RandomScore(heads, press(seed=seed))


@dataclass(frozen=True, kw_only=True)
class Mixed(Scored):
    """The better of KeyDiff's and SnapKV's ranks."""

    name: ClassVar[str] = "mixed"
    title: ClassVar[str] = "KeyDiff or SnapKV"

    def score(self, heads: Heads, slots: int, seed: int) -> Score:
        keydiff, snapkv = (m.score(heads, slots, seed) for m in (KeyDiff(), SnapKV()))
        return presses.MixedScore(keydiff, snapkv)
