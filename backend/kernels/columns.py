"""The columns of `plan.py`'s tables as the kernels name them."""

from __future__ import annotations

import triton.language as tl

from . import plan

REQUEST, HEADER, OP = (tl.constexpr(n) for n in (plan.REQUEST, plan.HEADER, plan.OP))
INSTANCES, ITEM = tl.constexpr(plan.INSTANCES), tl.constexpr(plan.ITEM)

# A step's requests.
EVENT, EVENTS, OLD, SHIFT, TOKEN = (
    tl.constexpr(n) for n in (plan.EVENT, plan.EVENTS, plan.OLD, plan.SHIFT, plan.TOKEN)
)
SEED_LOW, SEED_HIGH, TABLE, LIST, INSTANCE = (
    tl.constexpr(n) for n in (plan.SEED_LOW, plan.SEED_HIGH, plan.TABLE, plan.LIST, plan.INSTANCE)
)
FINAL_STORED, FINAL_LIVE, STOP, RING, RING_FROM, KNOWN = (
    tl.constexpr(n)
    for n in (
        plan.FINAL_STORED, plan.FINAL_LIVE, plan.STOP, plan.RING, plan.RING_FROM, plan.KNOWN,
    )
)  # fmt: skip
# A layout's events.
POSITION, STORED, INCOMING, LIVE, AFTER = (
    tl.constexpr(n) for n in (plan.POSITION, plan.STORED, plan.INCOMING, plan.LIVE, plan.AFTER)
)
ROUND, ROUNDS, FINAL, BIAS = (
    tl.constexpr(n) for n in (plan.ROUND, plan.ROUNDS, plan.FINAL, plan.BIAS)
)
# An event's operations.
KIND, LENGTH, SEEN, INDEX, INPUTS, OUTPUT = (
    tl.constexpr(n)
    for n in (plan.KIND, plan.LENGTH, plan.SEEN, plan.INDEX, plan.INPUTS, plan.OUTPUT)
)
