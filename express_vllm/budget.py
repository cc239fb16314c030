"""`Budget`: what one request may use, and the operator's limits that it is checked against.

A request names its budget through sampling `extra_args` (over HTTP: `vllm_xargs`), in the fields
of `FIELDS`.  `resolve` turns them into a `Budget` or raises `BudgetError`, whose message names the
field, the value and what is allowed.  The same function runs in the API server, which refuses bad
requests, and in the engine, so both always agree.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .layout import (
    MIN_SLOTS,
    PROFILES,
    RING_SLOTS,
    SCHEDULES,
    Layout,
    Shape,
    layout_for,
    make_shape,
)

PREFIX = "express_"
MODES = ("express", "exact")
#: Request field -> what it means (docs/budgets.md).
FIELDS = {
    "express_memory_tokens": "most KV slots per layer and KV head that the request may ever hold",
    "express_compute_tokens": "most KV entries that one token may attend to",
    "express_seed": "seed of the compression's random choices",
    "express_mode": "'express' (bounded) or 'exact' (every token is kept)",
    "express_profile": "'recent' keeps recent tokens dense, 'even' favours old ones",
}
MAX_SEED = 2**63 - 1


class BudgetError(ValueError):
    """A budget that is refused: `field`, `value` and what is `allowed`."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field}={value!r} is not allowed: {allowed}")
        self.field, self.value, self.allowed = field, value, allowed


@dataclass(frozen=True)
class Budget:
    """A resolved budget.  `shape` is None when every token is kept (then `slots` are needed)."""

    mode: str
    memory_tokens: int
    compute_tokens: int
    seed: int
    profile: str
    slots: int
    shape: Shape | None

    @property
    def layout(self) -> Layout | None:
        return None if self.shape is None else layout_for(self.shape)

    def reserved(self, tokens: int) -> int:
        """Slots that must be allocated once `tokens` tokens are stored."""
        return tokens if self.shape is None else layout_for(self.shape).reserved(tokens)


@dataclass(frozen=True)
class ServerConfig:
    """The operator's `--additional-config '{"express": {...}}'`: defaults, limits and shape.

    `None` for a limit means the model's maximal length, for a size of the shape that it follows
    the budget (layout.make_shape).
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

    @classmethod
    def parse(cls, raw: object) -> ServerConfig:
        """Check the operator's dictionary.  Raises BudgetError naming `express.<key>`."""
        if not isinstance(raw, Mapping):
            raise BudgetError("express", raw, "it must be a JSON object")
        known = {f.name for f in fields(cls)}
        for name, value in raw.items():
            if name not in known:
                raise BudgetError(f"express.{name}", value, _unknown(str(name), known))
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
        _integer("express.sinks", self.sinks, 0, 64)
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
        try:
            self.shape(self.memory_tokens, self.profile)
        except ValueError as error:
            raise BudgetError("express.memory_tokens", self.memory_tokens, str(error)) from error

    def shape(self, slots: int, profile: str) -> Shape:
        return make_shape(
            slots, schedule=self.schedule, profile=profile, sinks=self.sinks, heavy=self.heavy,
            window=self.window, interval=self.interval, group=self.group,
        )  # fmt: skip

    def memory_cap(self, max_model_len: int) -> int:
        """The most slots that any request of this server may hold."""
        return min(self.max_memory_tokens or max_model_len, max_model_len)

    @property
    def ring(self) -> int:
        """Slots of a budget that hold queries and are never attended."""
        return 0 if self.schedule == "paper" or self.heavy == 0 else RING_SLOTS


def resolve(
    extra_args: Mapping[str, Any] | None,
    config: ServerConfig,
    *,
    prompt_tokens: int,
    max_tokens: int | None,
    max_model_len: int,
) -> Budget:
    """The budget of a request of `prompt_tokens` plus at most `max_tokens` tokens.

    A request whose whole length fits its budget keeps every token.  Raises BudgetError.
    """
    asked = {k: v for k, v in (extra_args or {}).items() if str(k).startswith(PREFIX)}
    for name, value in asked.items():
        if name not in FIELDS:
            raise BudgetError(name, value, _unknown(name, set(FIELDS)))
    mode = _choice("express_mode", asked.get("express_mode", config.mode), MODES)
    profile = _choice(
        "express_profile", asked.get("express_profile", config.profile), tuple(PROFILES)
    )
    seed = _integer("express_seed", asked.get("express_seed", config.seed), 0, MAX_SEED)
    length = max_model_len
    if max_tokens is not None:
        length = min(max_model_len, prompt_tokens + max_tokens)
    memory = _memory(asked, config, mode, max_model_len)
    compute = asked.get("express_compute_tokens", config.compute_tokens)
    if compute is None:
        compute = memory
    elif "express_compute_tokens" in asked:
        _integer(
            "express_compute_tokens", compute, MIN_SLOTS, memory,
            f"it cannot exceed the memory, {memory} tokens",
        )  # fmt: skip
    compute = min(compute, memory)
    if mode == "exact":
        _check_exact(length, memory, "express_memory_tokens" in asked)
        return Budget(mode, memory, compute, seed, profile, length, None)
    slots = min(memory, compute + config.ring)
    if length <= min(memory, compute):
        return Budget(mode, memory, compute, seed, profile, length, None)
    try:
        shape = config.shape(slots, profile)
    except ValueError as error:
        raise BudgetError("express_memory_tokens", memory, str(error)) from error
    return Budget(mode, memory, compute, seed, profile, slots, shape)


def _memory(asked: Mapping[str, Any], config: ServerConfig, mode: str, max_model_len: int) -> int:
    cap = config.memory_cap(max_model_len)
    if "express_memory_tokens" not in asked:
        return cap if mode == "exact" else min(config.memory_tokens, cap)
    return _integer(
        "express_memory_tokens", asked["express_memory_tokens"], config.min_memory_tokens, cap
    )


def _check_exact(length: int, memory: int, asked: bool) -> None:
    if length <= memory:
        return
    limit = "express_memory_tokens" if asked else "the server's max_memory_tokens"
    raise BudgetError(
        "express_mode", "exact",
        f"the request may grow to {length} tokens, but {limit} allows {memory}; "
        "lower max_tokens, shorten the prompt or use express_mode='express'",
    )  # fmt: skip


def _unknown(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}known fields are {', '.join(sorted(known))}"


def _integer(field: str, value: object, low: int, high: int | None, note: str = "") -> int:
    if high is not None and high < low:
        high = low
    allowed = f"an integer from {low} to {high}" if high is not None else f"an integer from {low}"
    if note:
        allowed += f" ({note})"
    if isinstance(value, bool) or not isinstance(value, int):
        raise BudgetError(field, value, f"it must be {allowed}")
    if value < low or (high is not None and value > high):
        raise BudgetError(field, value, f"it must be {allowed}")
    return value


def _choice(field: str, value: object, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise BudgetError(field, value, f"it must be one of {', '.join(allowed)}")
    return value
