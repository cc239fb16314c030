"""`Budget`: what one request may use, and the operator's limits that it is checked against.

A request names its budget through sampling `extra_args` (over HTTP: `vllm_xargs`, or the `express`
object, which becomes the same), in the fields of `fields.Fields`.  `resolve` turns them into a
`Budget` or raises `BudgetError`, whose message names the field, the value and what is allowed.  It
runs once for a request, at the edge (edge.py); the budget then travels with the request, as
`Budget.packed` and `unpack`, and nobody decides again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .fields import (
    MAX_SEED,
    PREFIX,
    BudgetError,
    Fields,
    limited,
    memory_slots,
    parse,
    unknown,
)
from .layout import (
    EXACT_SHAPE,
    MIN_SLOTS,
    PROFILES,
    RING_SLOTS,
    SCHEDULES,
    Layout,
    Shape,
    layout_for,
    make_shape,
)

__all__ = [
    "FIELDS", "MODES", "PREFIX", "Budget", "BudgetError", "ServerConfig", "on_grid", "resolve",
    "unpack",
]  # fmt: skip

MODES = ("express", "exact")
#: Powers of two, so that the pages of wide layers, too, hold a power of two of slots.
WIDE_FACTORS = (2, 4, 8)
#: Budgets that a power of two and the next one have between them, the first included.
GRID = 16
#: Request field -> what it means (docs/budgets.md).
FIELDS = {PREFIX + name: str(f.description) for name, f in Fields.model_fields.items()}


@dataclass(frozen=True)
class Budget:
    """A resolved budget.  When every token is kept it is `exact`: its shape is EXACT_SHAPE, and
    `slots` is the request's greatest length.

    Slots are those of an ordinary layer; a wide layer holds `wide`, which is None when the server
    has no wide layers or every token is kept (wide.py).
    """

    mode: str
    memory_tokens: int
    compute_tokens: int
    seed: int
    profile: str
    slots: int
    shape: Shape
    wide: Shape | None = None

    @property
    def exact(self) -> bool:
        """Whether every token is kept."""
        return self.shape.exact

    @property
    def layout(self) -> Layout:
        return layout_for(self.shape)

    def layout_in(self, wide: bool) -> Layout:
        """The layout in wide layers or in ordinary ones."""
        return layout_for((wide and self.wide) or self.shape)

    def compactions(self, tokens: int) -> int:
        """Events that have run when `tokens` tokens are stored."""
        return self.layout.events_done(tokens)

    def reserved(self, tokens: int) -> int:
        """Slots that must be allocated once `tokens` tokens are stored.

        Their blocks suffice in wide layers too: a block holds `wide_factor` times as many there.
        """
        return self.layout.reserved(tokens)

    @property
    def packed(self) -> list[Any]:
        """What `unpack` makes the budget from, in types that JSON and msgpack have."""
        return [
            self.mode, self.memory_tokens, self.compute_tokens, self.seed, self.profile, self.slots,
            not self.exact,
        ]  # fmt: skip


def on_grid(slots: int) -> int:
    """The most slots that a cache may have and `slots` pay for: at most 16 sizes to a doubling, no
    two closer than 16, so that a server has a few hundred shapes whatever is asked for."""
    step = max(GRID, 1 << (slots.bit_length() - 1) >> (GRID.bit_length() - 1))
    return slots // step * step


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
        try:
            self.shape(self.memory_tokens, self.profile)
        except ValueError as error:
            raise BudgetError("express.memory_tokens", self.memory_tokens, str(error)) from error

    def shape(self, slots: int, profile: str) -> Shape:
        return make_shape(
            slots, schedule=self.schedule, profile=profile, sinks=self.sinks, heavy=self.heavy,
            window=self.window, interval=self.interval, group=self.group, exponent=self.exponent,
        )  # fmt: skip

    def wide_shape(self, slots: int, profile: str) -> Shape | None:
        """Of the wide layers when the others hold `slots`."""
        return self.shape(slots * self.wide_factor, profile) if self.wide_layers else None

    def granted(self, slots: int) -> int:
        """`on_grid`, but never less than the operator's minimum."""
        return max(on_grid(slots), min(slots, self.min_memory_tokens))

    def memory_cap(self, max_model_len: int) -> int:
        """The most slots that any request of this server may hold."""
        return min(self.max_memory_tokens or max_model_len, max_model_len)

    def fields(self, max_model_len: int) -> type[Fields]:
        """What a request may say, within these limits."""
        return limited(self.min_memory_tokens, self.memory_cap(max_model_len))

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
    slot_bytes: int | None = None,
    prefix: str = PREFIX,
) -> Budget:
    """The budget of a request of `prompt_tokens` plus at most `max_tokens` tokens.

    A request whose whole length fits its budget keeps every token.  `slot_bytes` is what a slot
    takes over all layers and KV heads; errors name fields with `prefix`.  Raises BudgetError.
    """
    raw = {
        str(k).removeprefix(PREFIX): v
        for k, v in (extra_args or {}).items()
        if str(k).startswith(PREFIX)
    }
    asked = parse(raw, config.fields(max_model_len), prefix)
    mode = asked.mode or config.mode
    profile = asked.profile or config.profile
    seed = config.seed if asked.seed is None else asked.seed
    length = max_model_len
    if max_tokens is not None:
        length = min(max_model_len, prompt_tokens + max_tokens)
    memory = _memory(asked, config, mode, max_model_len, length, slot_bytes, prefix)
    compute = asked.compute_tokens
    if compute is None:
        compute = config.compute_tokens or memory
    elif compute > memory:
        raise BudgetError(
            f"{prefix}compute_tokens", compute,
            f"it must be an integer from {MIN_SLOTS} to {memory} "
            f"(it cannot exceed the memory, {memory} tokens)",
        )  # fmt: skip
    compute = min(compute, memory)
    if mode == "exact":
        given = asked.memory_tokens is not None or asked.memory is not None
        _check_exact(length, memory, given, prefix)
        return Budget(mode, memory, compute, seed, profile, length, EXACT_SHAPE)
    if length <= compute:
        return Budget(mode, memory, compute, seed, profile, length, EXACT_SHAPE)
    memory, compute = config.granted(memory), on_grid(compute)
    slots = min(memory, compute + config.ring)
    try:
        shape, wide = config.shape(slots, profile), config.wide_shape(slots, profile)
    except ValueError as error:
        raise BudgetError(f"{prefix}memory_tokens", memory, str(error)) from error
    return Budget(mode, memory, min(compute, memory), seed, profile, slots, shape, wide)


def unpack(packed: object, config: ServerConfig, length: int, max_model_len: int) -> Budget:
    """The budget of `Budget.packed`, for a request that may grow to `length` tokens.

    Raises ValueError if it is no budget of a server with `config`, or not of such a request.
    """
    if not isinstance(packed, list) or len(packed) != 7:
        raise ValueError("the request has no budget that was resolved by this version")
    mode, memory, compute, seed, profile, slots, bounded = packed
    shape, wide = EXACT_SHAPE, None
    if bounded:
        shape, wide = config.shape(slots, profile), config.wide_shape(slots, profile)
    too_small = not bounded and slots < min(length, max_model_len)
    if too_small or slots > config.memory_cap(max_model_len):
        raise ValueError(f"{slots} slots are no budget of this server for {length} tokens")
    return Budget(mode, memory, compute, seed, profile, slots, shape, wide)


def _memory(
    asked: Fields,
    config: ServerConfig,
    mode: str,
    max_model_len: int,
    length: int,
    slot_bytes: int | None,
    prefix: str,
) -> int:
    cap = config.memory_cap(max_model_len)
    if asked.memory_tokens is not None:
        if asked.memory is not None:
            raise BudgetError(
                f"{prefix}memory", asked.memory,
                f"{prefix}memory_tokens={asked.memory_tokens} is given too; give one of them",
            )  # fmt: skip
        return asked.memory_tokens
    if asked.memory is None:
        return cap if mode == "exact" else min(config.memory_tokens, cap)
    try:
        slots, share = memory_slots(asked.memory, length, slot_bytes)
    except ValueError as error:
        raise BudgetError(f"{prefix}memory", asked.memory, str(error)) from error
    low = min(config.min_memory_tokens, cap)
    if share:  # 10% of a short prompt is the least that there is
        slots = max(slots, low)
    if low <= slots <= cap:
        return slots
    limits = f"{low} to {cap} tokens"
    if slot_bytes:
        limits += f", {low * slot_bytes} to {cap * slot_bytes} bytes"
    raise BudgetError(
        f"{prefix}memory", asked.memory, f"it is {slots} tokens, and {limits} are allowed"
    )


def _check_exact(length: int, memory: int, asked: bool, prefix: str) -> None:
    if length <= memory:
        return
    limit = "the request's memory" if asked else "the server's max_memory_tokens"
    raise BudgetError(
        f"{prefix}mode", "exact",
        f"the request may grow to {length} tokens, but {limit} allows {memory}; "
        f"lower max_tokens, shorten the prompt or use {prefix}mode='express'",
    )  # fmt: skip


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
