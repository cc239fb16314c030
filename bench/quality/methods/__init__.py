"""The methods that are compared, one small class each: what it computes, its parameters, its paper.

`METHODS` is the registry, in the order of the tables.
"""

from __future__ import annotations

from .base import Method
from .eviction import H2O, Exact, Expected, KeyDiff, KNorm, Mixed, Random, SnapKV, Streaming
from .thinning import Express, Published, Uniform

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (Exact, Express, Published, Uniform, Streaming, SnapKV, KNorm, KeyDiff, Expected,
                   H2O, Random, Mixed)
}  # fmt: skip

__all__ = ["METHODS", "Method"]
