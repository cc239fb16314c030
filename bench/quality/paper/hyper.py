"""HyperAttention (arXiv 2310.05869) in plain torch: an estimator, not a fast kernel.

Queries and keys are sorted by a locality-sensitive hash and attend within blocks of the sorted
order (section 3.1); everything outside the block is estimated from uniformly sampled columns.
Causal attention recurses: both halves of a sequence, and the second half's queries over the first
half's keys without a mask (section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..caches import ExactCache, causal, repeat
from ..harness import Heads

#: Hyperplanes of the hash: 2^BITS buckets, in Gray-code order so that neighbours differ in one.
BITS = 7
#: Attention scores that are held at a time; above it heads run one by one.
MOST_SCORES = 1 << 28
#: (output [B, H, L, d], log of the softmax's denominator [B, H, L]), both fp32.
Part = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Hyper:
    """`block` sorted neighbours and `samples` columns a query; up to `exact` tokens exactly."""

    block: int
    samples: int
    exact: int

    @classmethod
    def of(cls, slots: int) -> Hyper:
        """A quarter of the slots each for block and samples; leaves of half the slots."""
        return cls(slots // 4, slots // 4, slots // 2)


def buckets(x: Tensor, planes: Tensor) -> Tensor:
    """Bucket of each row of x [..., d] by its side of the planes [d, BITS], int64 [...].

    The sides are read as a Gray code: the parities of the bits from the highest on are its rank.
    """
    bits = (x.float() @ planes > 0).long()
    rank = bits.cumsum(-1) % 2
    return (rank << torch.arange(BITS - 1, -1, -1, device=x.device)).sum(-1)


def plain(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Part:
    """Exact attention; mask bool, True where a query [..., L, d] sees a key [..., S, d]."""
    scores = query @ key.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    norm = scores.logsumexp(-1)
    # A row that sees nothing: no output, and no weight in a merge.
    weights = (scores - norm.nan_to_num(neginf=0.0)[..., None]).exp()
    return weights @ value, norm


def merge(one: Part, other: Part) -> Part:
    """Attention over the union of two disjoint sets of keys."""
    norm = torch.logaddexp(one[1], other[1])
    safe = norm.nan_to_num(neginf=0.0)
    first, second = ((n - safe).exp()[..., None] for n in (one[1], other[1]))
    return first * one[0] + second * other[0], norm


def unmasked(
    query: Tensor, key: Tensor, value: Tensor, scale: float, hyper: Hyper, random: torch.Generator
) -> Part:
    """Every query [B, H, L, d] over all keys [B, H, S, d], estimated."""
    length, count = query.shape[2], key.shape[2]
    if count <= hyper.exact:
        return plain(query, key, value, scale, None)
    planes = torch.randn(query.shape[-1], BITS, generator=random).to(query.device)
    columns = torch.randperm(count, generator=random)[: hyper.samples].to(query.device)
    order_q, order_k = (buckets(x, planes).argsort(stable=True, dim=-1) for x in (query, key))
    blocks = -(-count // hyper.block)
    rows = -(-length // blocks)
    place = order_k.argsort(-1)  # of each key in the sorted order
    near = _diagonal(_sorted(query, order_q), _sorted(key, order_k), _sorted(value, order_k),
                     scale, blocks, rows, hyper.block)  # fmt: skip
    block_q = order_q.argsort(-1) // rows
    far = _sampled(query, key, value, scale, columns, block_q, place[..., columns] // hyper.block)
    back = order_q.argsort(-1)
    return merge((_sorted(near[0], back), near[1].gather(-1, back)), far)


def _sorted(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1]))


def _diagonal(
    query: Tensor, key: Tensor, value: Tensor, scale: float, blocks: int, rows: int, size: int
) -> Part:
    """Block i of `rows` sorted queries over block i of `size` sorted keys."""
    length, count = query.shape[2], key.shape[2]
    query = _padded(query, blocks * rows).unflatten(2, (blocks, rows))
    key, value = (_padded(x, blocks * size).unflatten(2, (blocks, size)) for x in (key, value))
    real = (torch.arange(blocks * size, device=key.device) < count).view(blocks, 1, size)
    output, norm = plain(query, key, value, scale, real)
    return output.flatten(2, 3)[:, :, :length], norm.flatten(2, 3)[:, :, :length]


def _padded(x: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, length - x.shape[2]))


def _sampled(
    query: Tensor, key: Tensor, value: Tensor, scale: float, columns: Tensor, block_q: Tensor,
    block_c: Tensor,
) -> Part:  # fmt: skip
    """The columns outside a query's own block, each for count / samples keys.

    Drawn without replacement, so that with every column drawn the estimate is exact.
    """
    outside = block_q[..., None] != block_c[..., None, :]
    output, norm = plain(query, key[:, :, columns], value[:, :, columns], scale, outside)
    weight = torch.tensor(key.shape[2] / len(columns), device=query.device)
    return output, norm + weight.log()


def causal_part(
    query: Tensor, key: Tensor, value: Tensor, scale: float, hyper: Hyper, random: torch.Generator
) -> Part:
    """Token i over tokens up to i, [B, H, L, d] each."""
    length = query.shape[2]
    if length <= hyper.exact:
        return plain(query, key, value, scale, causal(length, length, query.device))
    half = length // 2
    (q0, q1), (k0, k1), (v0, v1) = ((x[:, :, :half], x[:, :, half:]) for x in (query, key, value))
    early = causal_part(q0, k0, v0, scale, hyper, random)
    late = merge(
        causal_part(q1, k1, v1, scale, hyper, random),
        unmasked(q1, k0, v0, scale, hyper, random),
    )
    return torch.cat([early[0], late[0]], 2), torch.cat([early[1], late[1]], 2)


def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, hyper: Hyper, *, seed: int = 0,
    is_causal: bool = True,
) -> Tensor:  # fmt: skip
    """query [B, heads, L, d], key and value [B, KV heads, S, d] -> [B, heads, L, d].

    Causal: the last L of the S tokens are the queries' own.
    """
    group = query.shape[1] // key.shape[1]
    length, count = query.shape[2], key.shape[2]
    old = count - length if is_causal else count
    widest = length * max(hyper.block, hyper.samples)
    step = max(1, MOST_SCORES // (widest * len(query) * group))
    outputs = []
    for parts in zip(query.split(step * group, 1), key.split(step, 1), value.split(step, 1),
                     strict=True):  # fmt: skip
        random = torch.Generator().manual_seed(seed)
        q, k, v = (x.float() for x in (parts[0], *(repeat(x, group) for x in parts[1:])))
        found: list[Part] = []
        if old:
            found.append(unmasked(q, k[:, :, :old], v[:, :, :old], scale, hyper, random))
        if old < count:
            found.append(causal_part(q, k[:, :, old:], v[:, :, old:], scale, hyper, random))
        outputs.append((found[0] if len(found) == 1 else merge(*found))[0].to(query.dtype))
    return torch.cat(outputs, 1)


class HyperCache(ExactCache):
    """A layer whose attention is estimated; it keeps every token."""

    def __init__(self, heads: Heads, hyper: Hyper, seed: int) -> None:
        super().__init__(heads)
        self.hyper, self.seed = hyper, seed

    def output(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return attention(query, keys, values, self.scale, self.hyper, seed=self.seed)


def caches(heads: Heads, hyper: Hyper, seed: int, layers: Sequence[int]) -> list[HyperCache]:
    return [HyperCache(heads, hyper, 1000 * seed + layer) for layer in layers]
