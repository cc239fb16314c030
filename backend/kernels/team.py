"""Programs that wait for each other: members of a team, and attention for compaction."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Team(NamedTuple):
    """A program among those that share a layer, request and KV head."""

    member: Any
    size: Any
    arrived: Any  # pointer to the count of its meetings


@triton.jit
def meet(team, target):
    """Wait until every member has come as often as `target` says; what they wrote before can be
    read after."""
    tl.debug_barrier()
    if team.size > 1:
        tl.atomic_add(team.arrived, 1, sem="release", scope="gpu")
        wait_until(team.arrived, target)


@triton.jit
def written(p_progress, lists, team):
    """Tell attention, which runs at the same time, that so many lists of this head are there."""
    if team.member == 0:
        tl.atomic_xchg(p_progress, lists, sem="release", scope="gpu")


@triton.jit
def wait_until(p_count, target):
    """Wait until another program has counted up to `target`; what it wrote before can be read."""
    while acquire(p_count) < target:
        pass
    tl.debug_barrier()


@triton.jit
def acquire(p_count):
    """int32 at p_count, by a load: Triton orders only atomics like this, and they take longer."""
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [p_count.to(tl.int64)], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip
