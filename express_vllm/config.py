"""`ServerConfig`: the operator's defaults, limits and sizes, from `--additional-config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from .fields import MAX_SEED, MODES, BudgetError, unknown
from .shape import MIN_SLOTS, PROFILES, RING_SLOTS, SCHEDULES, Shape, make_shape

#: Powers of two, so that the pages of wide layers, too, hold a power of two of slots.
WIDE_FACTORS = (2, 4, 8)


@dataclass(frozen=True)
class ServerConfig:
    """The operator's `--additional-config '{"express": {...}}'`: defaults, limits and shape.

    `None` for a limit means what the longest request takes, for a size of the shape that it follows
    the budget (shape.make_shape).
    """

    memory_tokens: int = 2048
    compute_tokens: int | None = None
    min_memory_tokens: int = MIN_SLOTS
    max_memory_tokens: int | None = None
    mode: str = "express"
    profile: str = "recent"
    seed: int = 0
    schedule: str = "lazy"
    sinks: int = 4
    heavy: int | None = None
    window: int | None = None
    interval: int | None = None
    group: int | None = None
    exponent: float = 1.0
    #: None: those that were measured for the model, if it is a known one (wide.settle).
    wide_layers: tuple[int, ...] | None = None
    wide_factor: int = 4

    @classmethod
    def parse(cls, raw: object) -> ServerConfig:
        """Check the operator's dictionary.  Raises BudgetError naming `express.<key>`."""
        if not isinstance(raw, Mapping):
            raise BudgetError("express", raw, "it must be a JSON object")
        known = {f.name for f in fields(cls)}
        for name, value in raw.items():
            if name not in known:
                raise BudgetError(f"express.{name}", value, unknown(str(name), known))
        if isinstance(layers := raw.get("wide_layers"), list):
            raw = {**raw, "wide_layers": tuple(layers)}
        config = cls(**raw)
        config._check()
        return config

    def _check(self) -> None:
        for name in ("memory_tokens", "min_memory_tokens", "max_memory_tokens", "compute_tokens"):
            value = getattr(self, name)
            if value is None and name in ("max_memory_tokens", "compute_tokens"):
                continue
            _integer(f"express.{name}", value, MIN_SLOTS, None)
        for name in ("heavy", "window", "interval", "group"):
            value = getattr(self, name)
            if value is not None:
                _integer(f"express.{name}", value, 0, None)
        _share("express.exponent", self.exponent)
        _integer("express.sinks", self.sinks, 0, 64)
        _wide("express.wide_layers", self.wide_layers)
        _choice("express.wide_factor", self.wide_factor, WIDE_FACTORS)
        _integer("express.seed", self.seed, 0, MAX_SEED)
        _choice("express.mode", self.mode, MODES)
        _choice("express.profile", self.profile, tuple(PROFILES))
        _choice("express.schedule", self.schedule, SCHEDULES)
        if self.max_memory_tokens is not None and self.max_memory_tokens < self.memory_tokens:
            raise BudgetError(
                "express.max_memory_tokens", self.max_memory_tokens,
                f"it must be at least the default memory_tokens, {self.memory_tokens}",
            )  # fmt: skip
        if self.min_memory_tokens > self.memory_tokens:
            raise BudgetError(
                "express.min_memory_tokens", self.min_memory_tokens,
                f"it must be at most the default memory_tokens, {self.memory_tokens}",
            )  # fmt: skip
        self.check_slots(self.memory_tokens)

    def check_slots(self, slots: int) -> None:
        """Whether the default budget, which is so many slots, can be divided as configured."""
        try:
            self.shape(slots, self.profile)
        except ValueError as error:
            raise BudgetError("express.memory_tokens", self.memory_tokens, str(error)) from error

    def shape(self, slots: int, profile: str, pinned: int = 0) -> Shape:
        """Of a layer with `slots` slots that keeps its first `pinned` tokens, at least `sinks`."""
        return make_shape(
            slots, schedule=self.schedule, profile=profile, sinks=self.sinks, pinned=pinned,
            heavy=self.heavy, window=self.window, interval=self.interval, group=self.group,
            exponent=self.exponent,
        )  # fmt: skip

    @property
    def ring(self) -> int:
        """Slots of a budget that hold queries and are never attended."""
        return 0 if self.schedule == "paper" or self.heavy == 0 else RING_SLOTS


def _integer(field: str, value: object, low: int, high: int | None) -> None:
    allowed = f"an integer from {low} to {high}" if high is not None else f"an integer from {low}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise BudgetError(field, value, f"it must be {allowed}")
    if value < low or (high is not None and value > high):
        raise BudgetError(field, value, f"it must be {allowed}")


def _share(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise BudgetError(field, value, "it must be a number from 0 to 1")


def _choice(field: str, value: object, allowed: tuple[str | int, ...]) -> None:
    if not isinstance(value, type(allowed[0])) or value not in allowed:
        raise BudgetError(field, value, f"it must be one of {', '.join(map(str, allowed))}")


def _wide(field: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, tuple):
        if all(type(x) is int and x >= 0 for x in value) and len(set(value)) == len(value):
            return
        value = list(value)
    raise BudgetError(field, value, "it must be a list of different layer numbers, counted from 0")
