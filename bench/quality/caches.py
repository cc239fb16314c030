"""Caches to compare with: exact, a sliding window, streaming eviction by a score, uniform thinning.

Eviction runs like ours: exact until `slots` are in use, then before every `interval`-th token the
`interval` entries with the lowest scores leave.  Sinks and the `recent` latest tokens always stay.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol, Self

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from express_vllm.layout import Event, layout_for
from express_vllm.reference.attention import log_weights
from express_vllm.reference.cache import ExpressCache
from express_vllm.shape import Shape

if TYPE_CHECKING:
    from .harness import Heads


def repeat(x: Tensor, group: int) -> Tensor:
    """[B, KV heads, S, d] -> [B, heads, S, d]."""
    return x if group == 1 else x.repeat_interleave(group, 1)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, logw: Tensor | None
) -> Tensor:
    """The last L of S slots are the queries' own tokens; logw [S] (None: all weights are 1)."""
    length, slots, group = query.shape[2], keys.shape[2], query.shape[1] // keys.shape[1]
    keys, values = repeat(keys, group), repeat(values, group)
    if length == slots:
        return scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale)
    mask = causal(length, slots, query.device)
    if logw is None:
        return scaled_dot_product_attention(
            query, keys, values, attn_mask=mask[None, None], scale=scale
        )
    # In fp32: 16 bits would round log w, by the same amount for a whole level.
    bias = logw.float().to(query.device).expand(length, -1).masked_fill(~mask, float("-inf"))
    output = scaled_dot_product_attention(
        query.float(), keys.float(), values.float(), attn_mask=bias[None, None], scale=scale
    )
    return output.to(query.dtype)


def causal(length: int, slots: int, device: torch.device) -> Tensor:
    """Whether query i may see slot j, bool [L, S]."""
    last = slots - length + torch.arange(length, device=device)
    return torch.arange(slots, device=device)[None, :] <= last[:, None]


def probabilities(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Attention weights of the last L slots' queries over S slots, fp32 [B, heads, L, S]."""
    length, slots = query.shape[2], keys.shape[2]
    scores = query.float() @ repeat(keys, query.shape[1] // keys.shape[1]).float().mT * scale
    return scores.masked_fill(~causal(length, slots, query.device), float("-inf")).softmax(-1)


class ExactCache:
    """Every token stays."""

    def __init__(self, heads: Heads) -> None:
        self.scale = heads.scale
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.peak = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.keys, self.values = joined(self.keys, key), joined(self.values, value)
        self.peak = self.keys.shape[2]
        return self.output(query, self.keys, self.values)

    def output(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention over all tokens, of which the last ones are the queries' own."""
        return attend(query, keys, values, self.scale, None)

    def fork(self) -> Self:
        return copy.copy(self)  # tensors are replaced, never written


def joined(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else torch.cat([old, new], 2)


class WindowCache:
    """StreamingLLM (arXiv 2309.17453): the sinks and the latest `slots - sinks` tokens.

    A token leaves as the next one enters, so that the budget is always in full use; keys keep the
    positions that they had.
    """

    #: Tokens of a block of queries: bounds the mask.
    BLOCK = 512

    def __init__(self, heads: Heads, slots: int, sinks: int) -> None:
        self.scale, self.slots, self.sinks = heads.scale, slots, sinks
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.tokens = self.peak = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = zip(*(x.split(self.BLOCK, 2) for x in (query, key, value)), strict=True)
        return torch.cat([self._block(*part) for part in parts], 2)

    def _block(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = joined(self.keys, key), joined(self.values, value)
        length, slots = query.shape[2], keys.shape[2]
        mask = causal(length, slots, query.device)
        recent = self.slots - self.sinks
        slot = torch.arange(slots, device=query.device)
        last = slots - length + torch.arange(length, device=query.device)
        mask &= (slot[None, :] > last[:, None] - recent) | (slot < self.sinks)[None, :]
        group = query.shape[1] // keys.shape[1]
        output = scaled_dot_product_attention(
            query, repeat(keys, group), repeat(values, group), attn_mask=mask[None, None],
            scale=self.scale,
        )  # fmt: skip
        self.tokens += length
        self.peak = min(self.tokens, self.slots)
        self.keys, self.values = self._kept(keys), self._kept(values)
        return output

    def _kept(self, x: Tensor) -> Tensor:
        if x.shape[2] <= self.slots:
            return x
        return torch.cat([x[:, :, : self.sinks], x[:, :, self.sinks - self.slots :]], 2)

    def fork(self) -> WindowCache:
        return copy.copy(self)


class Score(Protocol):
    """What an entry is worth; holds whatever it must remember."""

    #: Whether `observe` wants attention weights.
    wants_weights: bool

    def observe(self, query: Tensor, weights: Tensor | None) -> None:
        """Tokens were appended and attended: query [B, heads, L, d], weights over all live slots
        [B, heads, L, S] or None."""

    def score(self, keys: Tensor, values: Tensor, tokens: int) -> Tensor:
        """[B, KV heads, S], high stays; `tokens` were seen so far."""

    def keep(self, index: Tensor) -> None:
        """Only the entries index [B, KV heads, K] stay."""


class EvictingCache:
    """Streaming eviction: entries have weight 1, what leaves is forgotten."""

    def __init__(
        self, heads: Heads, slots: int, interval: int, sinks: int, recent: int, score: Score
    ) -> None:
        if sinks + recent > slots - interval:
            raise ValueError(
                f"{sinks} sinks and {recent} recent tokens do not fit the {slots - interval} slots "
                f"that an eviction leaves of {slots}"
            )
        self.scale, self.slots, self.interval = heads.scale, slots, interval
        self.sinks, self.recent, self.score = sinks, recent, score
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.positions: Tensor | None = None  # [B, KV heads, live]
        self.tokens = self.peak = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        outputs, at = [], 0
        while at < query.shape[2]:
            if self.live == self.slots:
                self._evict()
            stop = min(at + self.slots - self.live, query.shape[2])
            outputs.append(self._piece(*(x[:, :, at:stop] for x in (query, key, value))))
            at = stop
        return torch.cat(outputs, 2)

    @property
    def live(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def _piece(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        count = key.shape[2]
        position = torch.arange(self.tokens, self.tokens + count, device=key.device)
        self.positions = joined(self.positions, position.expand(*key.shape[:2], count))
        self.keys, self.values = joined(self.keys, key), joined(self.values, value)
        self.tokens += count
        self.peak = max(self.peak, self.live)
        if not self.score.wants_weights:
            output = attend(query, self.keys, self.values, self.scale, None)
            self.score.observe(query, None)
            return output
        # In rows, since weights of a long exact phase are large.
        outputs = []
        for first in range(0, count, 256):
            rows = query[:, :, first : first + 256]
            slots = self.live - count + first + rows.shape[2]
            weights = probabilities(rows, self.keys[:, :, :slots], self.scale)
            self.score.observe(rows, weights)
            values = repeat(self.values[:, :, :slots], rows.shape[1] // key.shape[1])
            outputs.append(weights.to(values.dtype) @ values)
        return torch.cat(outputs, 2)

    def _evict(self) -> None:
        assert self.keys is not None and self.values is not None and self.positions is not None
        score = self.score.score(self.keys, self.values, self.tokens).float().clone()
        score[:, :, : self.sinks] = float("inf")
        if self.recent:
            score[:, :, -self.recent :] = float("inf")
        index = score.topk(self.slots - self.interval, -1).indices.sort(-1).values
        wide = index[..., None].expand(-1, -1, -1, self.keys.shape[-1])
        self.keys, self.values = self.keys.gather(2, wide), self.values.gather(2, wide)
        self.positions = self.positions.gather(2, index)
        self.score.keep(index)

    def fork(self) -> EvictingCache:
        twin = copy.copy(self)
        twin.score = copy.copy(self.score)
        return twin


class Accumulated:
    """H2O (arXiv 2306.14048): the attention that an entry has received from all queries since.

    The library's press needs every attention weight at once; this one sums them as they stream by.
    """

    wants_weights = True

    def __init__(self, heads: Heads) -> None:
        self.kv = heads.kv
        self.mass: Tensor | None = None  # [B, KV heads, live]

    def observe(self, query: Tensor, weights: Tensor | None) -> None:
        assert weights is not None
        batch, slots = weights.shape[0], weights.shape[-1]
        new = weights.sum(2).view(batch, self.kv, -1, slots).mean(2)
        if self.mass is not None:
            new[:, :, : self.mass.shape[2]] += self.mass
        self.mass = new

    def score(self, keys: Tensor, values: Tensor, tokens: int) -> Tensor:
        assert self.mass is not None
        return self.mass

    def keep(self, index: Tensor) -> None:
        assert self.mass is not None
        self.mass = self.mass.gather(2, index)


class UniformCache:
    """Our schedules with a coin for every pair: the baseline that looks at nothing.

    The oracle (`express_vllm.reference`) decides which slots stay; since no decision depends on
    data, it does so once for all sequences.
    """

    def __init__(self, heads: Heads, shape: Shape, layer: int, seed: int) -> None:
        if shape.heavy:
            raise ValueError("uniform thinning has no heavy hitters")
        self.scale, self.shape, self.layer, self.seed, self.kv = (
            heads.scale, shape, layer, seed, heads.kv,
        )  # fmt: skip
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.tokens = self.peak = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        layout = layout_for(self.shape)
        outputs, at, length = [], 0, query.shape[2]
        while at < length:
            for event in layout.events(self.tokens, self.tokens + 1):
                self._compact(event)
            stop = min(at + layout.next_event_position(self.tokens + 1) - self.tokens, length)
            part = [x[:, :, at:stop] for x in (query, key, value)]
            self.keys, self.values = joined(self.keys, part[1]), joined(self.values, part[2])
            self.tokens += stop - at
            self.peak = max(self.peak, self.keys.shape[2])
            logw = log_weights(layout.segments(self.tokens), torch.float32)
            outputs.append(attend(part[0], self.keys, self.values, self.scale, logw.to(key.device)))
            at = stop
        return torch.cat(outputs, 2)

    def _compact(self, event: Event) -> None:
        assert self.keys is not None and self.values is not None
        order = torch.stack(
            [coin_order(self.shape, event, self.seed, self.layer, h) for h in range(self.kv)]
        ).to(self.keys.device)
        wide = order[None, :, :, None].expand(len(self.keys), -1, -1, self.keys.shape[-1])
        self.keys, self.values = self.keys.gather(2, wide), self.values.gather(2, wide)

    def fork(self) -> UniformCache:
        return copy.copy(self)


@lru_cache(maxsize=1 << 16)
def coin_order(shape: Shape, event: Event, seed: int, layer: int, head: int) -> Tensor:
    """The slots that the oracle keeps in an event if coins decide, int64 [live_after]."""
    cache = ExpressCache(
        layout_for(shape), 1, seed=seed, layer=layer, kv_head=head, kernel="uniform"
    )
    slots = torch.arange(event.live_before)
    cache.keys = cache.values = slots[:, None].double()
    cache.positions = slots
    cache._compact(event)
    return cache.positions
