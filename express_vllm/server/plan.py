"""What a request would use, without running it: the answers of `plan` and `config`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import BaseModel, Field

from ..budget import Budget
from ..config import ServerConfig
from ..kvsize import KVSize
from ..layers import ModelLayers
from ..layout import Layout
from ..settings import Settings
from ..shape import MIN_SLOTS
from .usage import Sequence, usage


@dataclass(frozen=True)
class Capacity:
    """The engine's pool: `blocks` for requests, of `block_size` slots of an ordinary layer.

    A block serves `layers.group_size` layers; bounded layers take theirs from the same pool.
    """

    blocks: int
    block_size: int
    max_requests: int
    layers: ModelLayers

    def tokens(self, size: KVSize) -> int:
        """What the pool holds, in tokens of exact attention in the layers that grow."""
        slots = self.blocks * self.block_size
        return slots * (self.layers.group_size + size.extra) // size.layers

    def equal(self, size: KVSize) -> Capacity:
        """The same bytes in a server all of whose layers are equal."""
        return replace(self, blocks=self.tokens(size) // self.block_size)

    def needs(self, slots: int, stored: int) -> int:
        """Blocks of a request with `slots` slots and `stored` tokens."""
        growing = math.ceil(slots / self.block_size) * self.layers.groups
        return growing + self.layers.bounded_blocks(stored, self.block_size)

    def bounded_bytes(self, stored: int, size: KVSize) -> int:
        """What the bounded layers take of a request with `stored` tokens, in whole blocks."""
        tokens = self.layers.bounded_blocks(stored, self.block_size) * self.block_size
        return tokens * self.layers.group_size * size.bytes_in_layer

    def fits(self, slots: int, stored: int) -> int:
        """How many such requests run at once."""
        return min(self.blocks // max(1, self.needs(slots, stored)), self.max_requests)


class Pair(BaseModel):
    """The same number for the planned budget and for exact attention (all layers equal)."""

    planned: int
    exact: int


class Attended(BaseModel):
    """Entries that an output token attends to, itself included: means over the layers."""

    mean: float
    most: int
    exact_mean: float


class Bound(BaseModel):
    """What is proven about the approximation (arXiv 2606.10944)."""

    applies: bool = Field(description="whether it is proven for what this server runs")
    factor: float | None = Field(
        description="the sub-Gaussian error of the attention is at most about this many times that "
        "of halving all tokens at once to the same size: 2 sqrt(log2 n_out + 6)"
    )
    coreset_tokens: int | None = Field(description="n_out, the size that the factor is for")
    note: str


class Plan(BaseModel):
    """What a request uses if it generates all of its `max_tokens`."""

    mode: str
    memory_tokens: int
    compute_tokens: int
    pinned_tokens: int
    peak_kv_tokens: int
    exact_kv_tokens: int
    compression_ratio: float
    compactions: int
    bytes: Pair
    blocks: Pair
    concurrent_requests: Pair
    attended_tokens: Attended
    error_bound: Bound


def plan(
    budget: Budget, settings: Settings, capacity: Capacity, prompt_tokens: int, max_tokens: int
) -> Plan:
    """The `Plan` of a request; its last token is sampled but never stored."""
    size, sequence = settings.size, Sequence(budget, prompt_tokens, max_tokens)
    used = usage([sequence], size)
    stored, slots = sequence.stored, budget.reserved(sequence.stored)
    bounded = capacity.bounded_bytes(stored, size)
    return Plan(
        **used,  # all but `sequences`, which a plan has one of
        compute_tokens=budget.compute_tokens,
        bytes=Pair(
            planned=used["peak_kv_tokens"] * size.bytes_per_token + bounded,
            exact=stored * size.bytes_per_token + bounded,
        ),
        blocks=Pair(planned=capacity.needs(slots, stored), exact=capacity.needs(stored, stored)),
        concurrent_requests=Pair(
            planned=capacity.fits(slots, stored), exact=capacity.equal(size).fits(stored, stored)
        ),
        attended_tokens=attended(budget, settings, prompt_tokens, stored + 1),
        error_bound=error_bound(budget, settings.config),
    )


def attended(budget: Budget, settings: Settings, start: int, stop: int) -> Attended:
    """Over states of `start` to `stop` - 1 tokens."""
    wide = len(settings.config.wide_layers or ())
    ordinary = _attended(budget.layout, start, stop)
    found = [
        (settings.size.layers - wide, ordinary),
        (wide, _attended(budget.layout_in(True), start, stop) if wide else ordinary),
    ]

    def mean(index: int) -> float:
        return sum(layers * pair[index] for layers, pair in found) / settings.size.layers

    return Attended(
        mean=round(mean(0), 2), most=math.ceil(mean(1)), exact_mean=(start + stop - 1) / 2
    )


def _attended(layout: Layout, start: int, stop: int) -> tuple[float, int]:
    """The mean and the most of one layer."""
    found = layout.attended(start, stop)
    return found.total / (stop - start), found.most


def error_bound(budget: Budget, config: ServerConfig) -> Bound:
    """The published bound, and whether it is about what runs here."""
    if budget.exact:
        return Bound(applies=True, factor=0.0, coreset_tokens=None, note="every token is kept")
    if config.schedule == "paper":
        target = budget.shape.target
        factor = round(2 * math.sqrt(math.log2(target) + 6), 3)
        note = "the schedule of the paper, for its kernel and up to its inflation limit"
        return Bound(applies=True, factor=factor, coreset_tokens=target, note=note)
    note = (
        "the lazy schedule has no proven bound (docs/results has its measured errors); "
        'a server with "schedule": "paper" has one'
    )
    return Bound(applies=False, factor=None, coreset_tokens=None, note=note)


def describe_server(settings: Settings, capacity: Capacity, fields: Any) -> dict[str, Any]:
    """The answer of `GET /v1/express/config`.

    Where no sequence is long enough to be thinned, every request is exact and there is no shape.
    """
    config, size = settings.config, settings.size
    cap = settings.max_memory_tokens
    memory = min(config.memory_tokens, cap)
    slots = size.slots(memory)
    shape = None if slots < MIN_SLOTS else asdict(config.shape(slots, config.profile))
    return {
        "defaults": {
            "memory_tokens": memory,
            "compute_tokens": config.compute_tokens or memory,
            "mode": config.mode, "profile": config.profile, "seed": config.seed,
        },
        "limits": {
            "min_memory_tokens": settings.min_memory_tokens,
            "max_memory_tokens": max(cap, settings.min_memory_tokens),
            "max_model_len": settings.max_model_len,
        },
        "exact_tokens": slots,
        "schedule": config.schedule,
        "shape": shape,
        "wide": {"layers": config.wide_layers or (), "factor": config.wide_factor},
        "bytes_per_token": size.bytes_per_token,
        "model_shape": asdict(size),
        "pool": {
            "block_size": capacity.block_size, "blocks": capacity.blocks,
            "kv_tokens": capacity.tokens(size),
            "bytes": capacity.tokens(size) * size.bytes_per_token,
            "max_requests": capacity.max_requests,
        },
        "fields": fields.model_json_schema()["properties"],
    }  # fmt: skip
