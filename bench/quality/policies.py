"""Policies by name: `name` or `name:key=value,key=value`, each with a number of peak slots.

exact                       every token
express                     ours, with equal layers; options of the shape: schedule, profile, sinks,
                            heavy, window, interval, group, exponent; kernel = gaussian, exponential
                            or (CPU) uniform.  A size may be a share of the slots: heavy=0.25
paper                       published Express, as rebuilt (docs/algorithm.md)
uniform                     our schedule with coins; uniform:schedule=paper for the published one
streaming                   StreamingLLM, evicting at every token
snapkv knorm keydiff expected h2o random
                            streaming eviction; options: interval, sinks, recent, shared=1 (the KV
                            heads of a layer keep the same tokens)
mixed                       eviction by the better of KeyDiff's and SnapKV's ranks

tilt=x, of all but exact: layers have (1 + x) times the slots at first to (1 - x) times at last;
steps=n with it: in n groups of layers, each with the mean of its layers.
wide=i/j/..., too: these layers have factor=n (4) times the slots of the others; wide=auto: those
that the server takes for the model, which is its default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from express_vllm.config import ServerConfig
from express_vllm.layout import PROFILES, Shape, make_shape
from express_vllm.wide import settle

from . import presses
from .caches import Accumulated, EvictingCache, ExactCache, Score, UniformCache, WindowCache
from .express import ExpressCache, ForcedShape, Plans
from .harness import Heads, LayerCache

SINKS = 4
#: Peers that evict by a score -> the share of the slots that holds recent tokens for sure: a
#: quarter as in our default; H2O's paper gives half, SnapKV's press protects its own window.
RECENT = {"snapkv": 0.0, "knorm": 0.25, "keydiff": 0.25, "expected": 0.25, "h2o": 0.5,
          "random": 0.25, "mixed": 0.25}  # fmt: skip
OURS = ("express", "paper", "uniform")
ALL = ("exact", *OURS, "streaming", *RECENT)
#: What the server does.
DEFAULT = "express:wide=auto"
#: What is measured unless told otherwise.
NAMES = (*(name for name in ALL if name != "mixed"), DEFAULT)
SHAPE_SIZES = ("sinks", "heavy", "window", "interval", "group")
#: How layers differ.
BY_LAYER = ("tilt", "steps", "wide", "factor")
KINDS = {"exponent": float, "tilt": float, "wide": str}
TITLES = {
    "exact": "exact", DEFAULT: "express (default)", "express": "express, equal layers",
    "paper": "published Express",
    "uniform": "uniform thinning", "streaming": "StreamingLLM", "snapkv": "SnapKV-style",
    "knorm": "KNorm", "keydiff": "KeyDiff", "expected": "expected attention", "h2o": "H2O-style",
    "random": "random eviction", "mixed": "KeyDiff or SnapKV",
}  # fmt: skip


@dataclass(frozen=True)
class Policy:
    """A way to keep at most `slots` slots."""

    name: str
    slots: int
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, slots: int) -> Policy:
        name, _, rest = text.partition(":")
        if name not in ALL:
            raise ValueError(f"policy {name!r} is not one of {', '.join(ALL)}")
        allowed = {"exact": (), "streaming": ("sinks", *BY_LAYER)}.get(
            name,
            ("schedule", "profile", "kernel", "exponent", *SHAPE_SIZES, *BY_LAYER) if name in OURS
            else ("interval", "sinks", "recent", "shared", *BY_LAYER),
        )  # fmt: skip
        options: dict[str, Any] = {}
        for part in filter(None, rest.split(",")):
            key, _, value = part.partition("=")
            if key not in allowed:
                raise ValueError(f"policy {name!r} has no option {key!r}: {', '.join(allowed)}")
            options[key] = KINDS[key](value) if key in KINDS else _value(value, slots)
        return cls(name, slots, options)

    @property
    def label(self) -> str:
        if not self.options:
            return self.name
        return self.name + ":" + ",".join(f"{k}={v}" for k, v in self.options.items())

    def shape(self) -> Shape:
        """The cache shape of ours, and the one whose interval peers follow."""
        options = {k: v for k, v in self.options.items() if k not in ("kernel", *BY_LAYER)}
        if self.name == "paper":
            options["schedule"] = "paper"
        if self.name == "uniform":
            options["heavy"] = 0
        shape = make_shape(self.slots, **(options if self.name in OURS else {}))
        kernel = self.options.get("kernel")
        return ForcedShape.of(shape, kernel) if kernel else shape

    def caches(self, heads: Heads, seed: int = 0) -> list[LayerCache]:
        """One per layer; layers of one size share their plans."""
        level = Policy(self.name, 0, {k: v for k, v in self.options.items() if k not in BY_LAYER})
        makers: dict[int, Callable[[int], LayerCache]] = {}
        caches = []
        for layer, slots in enumerate(self.layer_slots(heads)):
            if slots not in makers:
                makers[slots] = replace(level, slots=slots)._maker(heads, seed)
            caches.append(makers[slots](layer))
        return caches

    def layer_slots(self, heads: Heads) -> list[int]:
        """Peak slots of every layer; their mean is at most `slots`."""
        wide, factor = self._wide(heads)
        if wide:
            ordinary = self.slots * heads.layers // (heads.layers + len(wide) * (factor - 1))
            return [ordinary * (factor if i in wide else 1) for i in range(heads.layers)]
        tilt = self.options.get("tilt", 0.0)
        steps = self.options.get("steps", heads.layers if tilt else 1)
        groups = torch.linspace(1 + tilt, 1 - tilt, heads.layers).tensor_split(steps)
        return [round(self.slots * float(g.mean())) for g in groups for _ in range(len(g))]

    def _wide(self, heads: Heads) -> tuple[tuple[int, ...], int]:
        """The wide layers and how many times the slots of an ordinary one they have."""
        named = self.options.get("wide", "")
        if named == "auto":
            config = settle(ServerConfig(), heads.config)
            return config.wide_layers or (), config.wide_factor
        layers = tuple(map(int, filter(None, named.split("/"))))
        if any(layer >= heads.layers for layer in layers):
            raise ValueError(f"{self.label}: the model's layers are 0 to {heads.layers - 1}")
        return layers, self.options.get("factor", ServerConfig.wide_factor)

    def _maker(self, heads: Heads, seed: int) -> Callable[[int], LayerCache]:
        sinks = self.options.get("sinks", SINKS)
        if self.name == "exact":
            return lambda layer: ExactCache(heads)
        if self.name == "streaming":
            return lambda layer: WindowCache(heads, self.slots, sinks)
        shape = self.shape()
        if self.name == "uniform":
            return lambda layer: UniformCache(heads, shape, layer, seed)
        if self.name in OURS:
            plans = Plans(shape, seed, heads.group)
            return lambda layer: ExpressCache(heads, layer, plans)
        interval = self.options.get("interval", shape.interval)
        recent = self.options.get("recent", int(RECENT[self.name] * self.slots))
        recent = min(recent, self.slots - interval - sinks)
        return lambda layer: EvictingCache(
            heads, self.slots, interval, sinks, recent, self._score(heads, 1000 * seed + layer)
        )

    def _score(self, heads: Heads, seed: int) -> Score:
        score = self._own_score(self.name, heads, seed)
        return presses.SharedScore(score) if self.options.get("shared") else score

    def _own_score(self, name: str, heads: Heads, seed: int) -> Score:
        press = presses.press_class
        if name == "mixed":
            return presses.MixedScore(
                *(self._own_score(part, heads, seed) for part in ("keydiff", "snapkv"))
            )
        if name == "h2o":
            return Accumulated(heads)
        if name == "snapkv":
            window = min(presses.SNAP_WINDOW, self.slots // 4)
            return presses.SnapScore(
                heads, press("snapkv_press", "SnapKVPress")(window_size=window)
            )
        if name == "expected":
            return presses.ExpectedScore(
                heads, press("expected_attention_press", "ExpectedAttentionPress")()
            )
        if name == "random":
            return presses.RandomScore(heads, press("random_press", "RandomPress")(seed=seed))
        module, title = {
            "knorm": ("knorm_press", "KnormPress"),
            "keydiff": ("keydiff_press", "KeyDiffPress"),
        }[name]
        return presses.PressScore(heads, press(module, title)())


def _value(text: str, slots: int) -> Any:
    if text in ("gaussian", "exponential", "uniform", "lazy", "paper", *PROFILES):
        return text
    number = float(text)
    return round(number * slots) if "." in text else int(number)


def seeded(policy: Policy) -> bool:
    """Whether the policy's outcome depends on its seed."""
    return policy.name in (*OURS, "random")
