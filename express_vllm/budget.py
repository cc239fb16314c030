"""`Budget`: what one request may use.

A request names its budget through sampling `extra_args` (over HTTP: `vllm_xargs`, or the `express`
object, which becomes the same), in the fields of `fields.Fields`.  `resolve` turns them into a
`Budget` or raises `BudgetError`, whose message names the field, the value and what is allowed.  It
runs once for a request, at the edge (edge.py); the budget then travels with the request, as
`Budget.packed` and `unpack`, and nobody decides again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .fields import MODES, PREFIX, BudgetError, Fields, memory_amount, needs_integer, parse
from .layout import Layout, layout_for
from .shape import EXACT_SHAPE, Shape

if TYPE_CHECKING:
    from .config import ServerConfig
    from .settings import Settings

__all__ = [
    "FIELDS", "MODES", "PREFIX", "Budget", "BudgetError", "on_grid", "pins", "resolve", "unpack",
]  # fmt: skip

#: Budgets that a power of two and the next one have between them, the first included.
GRID = 16
#: Request field -> what it means (docs/budgets.md).
FIELDS = {PREFIX + name: str(f.description) for name, f in Fields.model_fields.items()}


@dataclass(frozen=True)
class Budget:
    """A resolved budget.  When every token is kept it is `exact`: its shape is EXACT_SHAPE, and
    `slots` is the request's greatest length.

    Memory and compute are means over the layers (kvsize.py).  `slots` and `shape` are of an
    ordinary layer; a wide one has the shape `wide`, which is None when the server has no wide
    layers or every token is kept (wide.py).
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
            not self.exact, self.wide.slots if self.wide else 0, self.shape.sinks,
        ]  # fmt: skip

    def pinned(self, tokens: int) -> int:
        """The first ones of `tokens` stored tokens that are kept whatever comes."""
        return tokens if self.exact else min(tokens, self.shape.sinks)


def _step(tokens: int) -> int:
    """From a size on the grid to the next: at most 16 sizes to a doubling, no two closer than 16,
    so that a server has a few hundred shapes whatever is asked for."""
    return max(GRID, 1 << (tokens.bit_length() - 1) >> (GRID.bit_length() - 1))


def on_grid(tokens: int) -> int:
    """The most memory that a cache may have and `tokens` pay for."""
    step = _step(tokens)
    return tokens // step * step


def pins(tokens: int, config: ServerConfig) -> int:
    """The tokens that are pinned for who asks for `tokens`: as many or more, on the grid; at least
    the server's sinks."""
    if tokens <= config.sinks:
        return config.sinks
    step = _step(tokens)
    return -(-tokens // step) * step


def resolve(
    extra_args: Mapping[str, Any] | None,
    settings: Settings,
    *,
    prompt_tokens: int,
    max_tokens: int | None,
    prefix: str = PREFIX,
) -> Budget:
    """The budget of a request of `prompt_tokens` plus at most `max_tokens` tokens.

    A request keeps every token if an ordinary layer's part of its budget has a slot for each.
    Errors name fields with `prefix`.  Raises BudgetError.
    """
    raw = {
        str(k).removeprefix(PREFIX): v
        for k, v in (extra_args or {}).items()
        if str(k).startswith(PREFIX)
    }
    config, size = settings.config, settings.size
    asked = parse(raw, settings.fields, prefix)
    pinned = _pinned(asked, prompt_tokens, config, prefix)
    mode = asked.mode or config.mode
    profile = asked.profile or config.profile
    seed = config.seed if asked.seed is None else asked.seed
    length = settings.max_model_len
    if max_tokens is not None:
        length = min(length, prompt_tokens + max_tokens)
    memory = _memory(asked, settings, mode, length, prefix)
    compute = _compute(asked, settings, memory, prefix)
    if mode == "exact":
        given = asked.memory_tokens is not None or asked.memory is not None
        _check_exact(length, memory, settings, given, prefix)
        return Budget(mode, memory, compute, seed, profile, length, EXACT_SHAPE)
    if length <= size.slots(compute):
        return Budget(mode, memory, compute, seed, profile, length, EXACT_SHAPE)
    memory = max(on_grid(memory), min(memory, settings.min_memory_tokens))
    compute = min(memory, max(on_grid(compute), min(compute, settings.least_tokens)))
    try:
        shape, wide = _shapes(memory, compute, profile, pinned, settings)
    except ValueError as error:
        if pinned > config.sinks:
            least = _least_for(pinned, length, profile, settings)
            allowed = _room_for(pinned, least, settings, prefix)
            raise BudgetError(f"{prefix}pinned_tokens", asked.pinned_tokens, allowed) from error
        raise BudgetError(f"{prefix}memory_tokens", memory, str(error)) from error
    return Budget(mode, memory, compute, seed, profile, shape.slots, shape, wide)


def _shapes(
    memory: int, compute: int, profile: str, pinned: int, settings: Settings
) -> tuple[Shape, Shape | None]:
    """The shapes in ordinary layers and in wide ones, whose means are at most the budget; both keep
    the first `pinned` tokens."""
    config, size = settings.config, settings.size

    def shape(factor: int) -> Shape:
        held, attended = size.slots(memory) * factor, size.slots(compute) * factor
        return config.shape(min(held, attended + config.ring), profile, pinned)

    return shape(1), shape(config.wide_factor) if config.wide_layers else None


def unpack(packed: object, settings: Settings, length: int) -> Budget:
    """The budget of `Budget.packed`, for a request that may grow to `length` tokens.

    Raises ValueError if it is no budget of a server with `settings`, or not of such a request.
    """
    if not isinstance(packed, list) or len(packed) != 9:
        raise ValueError("the request has no budget that was resolved by this version")
    mode, memory, compute, seed, profile, slots, bounded, wide_slots, pinned = packed
    config = settings.config
    _check_numbers([memory, compute, seed, slots, wide_slots, pinned])
    if type(bounded) is not bool:
        raise ValueError(f"{bounded!r} in it is no budget of this server: it must be true or false")
    if pinned != (pins(pinned, config) if bounded else 0):
        raise ValueError(f"{pinned} pinned tokens are no budget of this server")
    shape, wide = EXACT_SHAPE, None
    if bounded:
        shape = config.shape(slots, profile, pinned)
        wide = config.shape(wide_slots, profile, pinned) if wide_slots else None
    too_small = not bounded and slots < min(length, settings.max_model_len)
    other_layers = bool(wide_slots) != bool(bounded and config.wide_layers)
    too_wide = wide_slots > slots * config.wide_factor  # more than the pages of the blocks hold
    if too_small or other_layers or too_wide or slots > settings.most_slots:
        raise ValueError(
            f"{slots} slots, {wide_slots} in wide layers, are no budget of this server for "
            f"{length} tokens"
        )
    return Budget(mode, memory, compute, seed, profile, slots, shape, wide)


def _check_numbers(values: list[Any]) -> None:
    for value in values:
        if type(value) is not int or value < 0:
            raise ValueError(f"{value!r} in it is no budget of this server: it must be a number")


def _pinned(asked: Fields, prompt_tokens: int, config: ServerConfig, prefix: str) -> int:
    """The tokens that are pinned, of a prompt of `prompt_tokens`: what is beyond it is no one's."""
    wanted = asked.pinned_tokens
    if isinstance(wanted, str):  # a chat route makes a number of it (server/front.py)
        raise needs_integer(prefix)
    return pins(min(wanted or 0, prompt_tokens), config)


def _least_for(pinned: int, length: int, profile: str, settings: Settings) -> int:
    """The least memory of a request that pins so many tokens: with it the caches have room, or all
    of the request's greatest `length` fits."""
    memory, fits = settings.min_memory_tokens, settings.size.tokens(length)
    while memory < fits:
        try:
            _shapes(memory, memory, profile, pinned, settings)
        except ValueError:
            memory = on_grid(memory + _step(memory))
        else:
            return memory
    return fits


def _room_for(pinned: int, least: int, settings: Settings, prefix: str) -> str:
    """What a request that pins so many tokens may say instead; it takes `least` memory."""
    most = settings.max_memory_tokens
    if least > most:
        return f"{pinned} pinned tokens take {least} of memory, and the server's most is {most}"
    return (
        f"to pin {pinned} tokens (it is rounded up) {prefix}memory_tokens, and "
        f"{prefix}compute_tokens if it is given, must be at least {least}"
    )


def _memory(asked: Fields, settings: Settings, mode: str, length: int, prefix: str) -> int:
    low, cap = settings.min_memory_tokens, settings.max_memory_tokens
    if asked.memory_tokens is not None:
        if asked.memory is not None:
            raise BudgetError(
                f"{prefix}memory", asked.memory,
                f"{prefix}memory_tokens={asked.memory_tokens} is given too; give one of them",
            )  # fmt: skip
        return asked.memory_tokens
    if asked.memory is None:
        return cap if mode == "exact" else min(settings.config.memory_tokens, cap)
    unit = settings.size.bytes_per_token
    tokens, share = memory_amount(asked.memory, length, unit)
    low = min(low, cap)
    if share:  # 10% of a short prompt is the least that there is
        tokens = max(tokens, low)
    if low <= tokens <= cap:
        return tokens
    raise BudgetError(
        f"{prefix}memory", asked.memory,
        f"it is {tokens} tokens, and {low} to {cap} tokens, {low * unit} to {cap * unit} bytes "
        "are allowed",
    )  # fmt: skip


def _compute(asked: Fields, settings: Settings, memory: int, prefix: str) -> int:
    compute = asked.compute_tokens
    if compute is None:
        return min(settings.config.compute_tokens or memory, memory)
    if compute > memory:
        raise BudgetError(
            f"{prefix}compute_tokens", compute,
            f"it must be an integer from {settings.least_tokens} to {memory} "
            f"(it cannot exceed the memory, {memory} tokens)",
        )  # fmt: skip
    return compute


def _check_exact(length: int, memory: int, settings: Settings, asked: bool, prefix: str) -> None:
    most = settings.size.slots(memory)
    if length <= most:
        return
    limit = "the request's memory" if asked else "the server's max_memory_tokens"
    raise BudgetError(
        f"{prefix}mode", "exact",
        f"the request may grow to {length} tokens, but {limit} of {memory} keeps {most}; "
        f"lower max_tokens, shorten the prompt or use {prefix}mode='express'",
    )  # fmt: skip
