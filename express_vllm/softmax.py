"""`Softmax`: how a layer of a model turns products of queries and keys into shares of attention."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Softmax(NamedTuple):
    """A slot's share is exp(s + log w) / (exp(sink) + the same sum over all slots).

    Its logit s is scale q.k, or cap tanh(scale q.k / cap) in models with a soft cap.  A sink is a
    logit that a model has learned for a query head: it takes attention and gives no value.
    """

    scale: float
    cap: float = 0.0  # 0: none
    sinks: Tensor | None = None  # [heads]: of this rank, of any floating type
    offsets: Tensor | None = None  # int64 [L]: elements from `sinks` to those of each of L layers

    def of_kv_head(self, head: int, heads: int) -> Softmax:
        """Of the query heads of one of `heads` KV heads, which divide the query heads evenly."""
        if self.sinks is None:
            return self
        return self._replace(sinks=self.sinks.detach().view(heads, -1)[head])

    def of_layers(self, first: int, count: int) -> Softmax:
        """Of `count` of the L layers."""
        if self.offsets is None:
            return self
        return self._replace(offsets=self.offsets[first : first + count])
