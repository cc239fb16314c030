"""Our cache, and what it is compared with on its own schedules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from express_vllm.shape import Shape, make_shape

from ..caches import UniformCache
from ..express import ExpressCache, ForcedShape, Plans
from ..harness import Heads
from .base import Layered, Maker, Size


@dataclass(frozen=True, kw_only=True)
class Express(Layered):
    """This project's cache (docs/algorithm.md), run by the code that serves; layers are equal
    unless told otherwise.

    Fields up to `exponent` are those of `shape.make_shape`.  `kernel` forces the halving kernel:
    gaussian, exponential or, on the CPU, uniform.
    """

    name: ClassVar[str] = "express"
    title: ClassVar[str] = "express"
    seeded: ClassVar[bool] = True

    schedule: str = ""
    profile: str = ""
    sinks: Size | None = None
    pinned: Size | None = None
    heavy: Size | None = None
    window: Size | None = None
    interval: Size | None = None
    group: Size | None = None
    exponent: float | None = None
    kernel: str = ""

    def shape(self, slots: int) -> Shape:
        names = ("schedule", "profile", "sinks", "pinned", "heavy", "window", "interval", "group")
        given = {name: getattr(self, name) for name in (*names, "exponent")}
        shape = make_shape(slots, **{k: v for k, v in given.items() if v not in (None, "")})
        return ForcedShape.of(shape, self.kernel) if self.kernel else shape

    def maker(self, heads: Heads, slots: int, seed: int) -> Maker:
        plans = Plans(self.shape(slots), seed, heads.group)
        return lambda layer: ExpressCache(heads, layer, plans)


@dataclass(frozen=True, kw_only=True)
class Published(Express):
    """Express Language Modeling (https://arxiv.org/abs/2606.10944), as rebuilt from the paper."""

    name: ClassVar[str] = "paper"
    title: ClassVar[str] = "published Express"

    schedule: str = "paper"


@dataclass(frozen=True, kw_only=True)
class Uniform(Express):
    """Our schedule with a coin for every pair: a coreset that looks at nothing."""

    name: ClassVar[str] = "uniform"
    title: ClassVar[str] = "uniform thinning"

    heavy: Size | None = 0

    def maker(self, heads: Heads, slots: int, seed: int) -> Maker:
        shape = self.shape(slots)
        return lambda layer: UniformCache(heads, shape, layer, seed)
