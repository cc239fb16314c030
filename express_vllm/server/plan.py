"""What a request would use, without running it: the answers of `plan` and `config`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel, Field

from ..budget import Budget, ServerConfig
from ..kvsize import KVSize
from ..layout import MIN_SLOTS, Layout
from .usage import Sequence, usage


@dataclass(frozen=True)
class Capacity:
    """The engine's pool: `blocks` usable by requests, of `block_size` slots."""

    blocks: int
    block_size: int
    max_requests: int

    def needs(self, slots: int) -> int:
        return math.ceil(slots / self.block_size)

    def fits(self, slots: int) -> int:
        """How many requests of `slots` slots run at once."""
        return min(self.blocks // max(1, self.needs(slots)), self.max_requests)


class Pair(BaseModel):
    """The same number for the planned budget and for exact attention."""

    planned: int
    exact: int


class Attended(BaseModel):
    """Entries that an output token attends to, itself included."""

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
    budget: Budget, config: ServerConfig, size: KVSize, capacity: Capacity,
    prompt_tokens: int, max_tokens: int,
) -> Plan:  # fmt: skip
    """The `Plan` of a request; its last token is sampled but never stored."""
    used = usage([Sequence(budget, prompt_tokens, max_tokens)])
    peak, stored = used["peak_kv_tokens"], used["exact_kv_tokens"]
    outputs = (prompt_tokens, stored + 1)
    return Plan(
        **used,  # all but `sequences`, which a plan has one of
        compute_tokens=budget.compute_tokens,
        bytes=Pair(planned=peak * size.slot_bytes, exact=stored * size.slot_bytes),
        blocks=Pair(planned=capacity.needs(peak), exact=capacity.needs(stored)),
        concurrent_requests=Pair(planned=capacity.fits(peak), exact=capacity.fits(stored)),
        attended_tokens=attended(budget.layout, *outputs),
        error_bound=error_bound(budget, config),
    )


def attended(layout: Layout, start: int, stop: int) -> Attended:
    """Over states of `start` to `stop` - 1 tokens."""
    exact = (start + stop - 1) / 2
    found = layout.attended(start, stop)
    mean = round(found.total / (stop - start), 2)
    return Attended(mean=mean, most=found.most, exact_mean=exact)


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
        "the lazy schedule has no proven bound (its measured errors are in the README); "
        'a server with "schedule": "paper" has one'
    )
    return Bound(applies=False, factor=None, coreset_tokens=None, note=note)


def describe_server(
    config: ServerConfig, size: KVSize, capacity: Capacity, max_model_len: int, fields: Any
) -> dict[str, Any]:
    """The answer of `GET /v1/express/config`.

    Where no sequence is long enough to be thinned, every request is exact and there is no shape.
    """
    cap = config.memory_cap(max_model_len)
    memory = min(config.memory_tokens, cap)
    shape = None if memory < MIN_SLOTS else asdict(config.shape(memory, config.profile))
    return {
        "defaults": {
            "memory_tokens": memory,
            "compute_tokens": config.compute_tokens or memory,
            "mode": config.mode, "profile": config.profile, "seed": config.seed,
        },
        "limits": {
            "min_memory_tokens": config.min_memory_tokens,
            "max_memory_tokens": max(cap, config.min_memory_tokens),
            "max_model_len": max_model_len,
        },
        "schedule": config.schedule,
        "shape": shape,
        "wide": {"layers": config.wide_layers or (), "factor": config.wide_factor},
        "bytes_per_token": size.slot_bytes,
        "model_shape": asdict(size),
        "pool": {
            "block_size": capacity.block_size, "blocks": capacity.blocks,
            "kv_slots": capacity.blocks * capacity.block_size,
            "bytes": capacity.blocks * capacity.block_size * size.slot_bytes,
            "max_requests": capacity.max_requests,
        },
        "fields": fields.model_json_schema()["properties"],
    }  # fmt: skip
