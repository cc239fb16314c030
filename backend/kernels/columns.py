"""The columns of `tables.py` as the kernels name them."""

from __future__ import annotations

import triton.language as tl

from . import tables

REQUEST, EVENT, OP, TILE = (
    tl.constexpr(n) for n in (tables.REQUEST, tables.EVENT, tables.OP, tables.TILE)
)

# A step's requests.
INSTANCE, EVENTS, OLD, SHIFT, TOKEN, DENSE = (
    tl.constexpr(n)
    for n in (
        tables.INSTANCE, tables.EVENTS, tables.OLD, tables.SHIFT, tables.TOKEN, tables.DENSE,
    )
)  # fmt: skip
SEED_LOW, SEED_HIGH, TABLE, LIST, WIDTH, KNOWN = (
    tl.constexpr(n)
    for n in (
        tables.SEED_LOW, tables.SEED_HIGH, tables.TABLE, tables.LIST, tables.WIDTH, tables.KNOWN,
    )
)  # fmt: skip
FINAL_STORED, FINAL_LIVE, STOP, RING, RING_FROM = (
    tl.constexpr(n)
    for n in (
        tables.FINAL_STORED, tables.FINAL_LIVE, tables.STOP, tables.RING, tables.RING_FROM,
    )
)  # fmt: skip
# Their events.
POSITION, STORED, INCOMING, LIVE, AFTER = (
    tl.constexpr(n)
    for n in (tables.POSITION, tables.STORED, tables.INCOMING, tables.LIVE, tables.AFTER)
)
ROUND, ROUNDS, FINAL, BIAS, SINKS, HEAVY = (
    tl.constexpr(n)
    for n in (
        tables.ROUND, tables.ROUNDS, tables.FINAL, tables.BIAS, tables.SINKS, tables.HEAVY,
    )
)  # fmt: skip
OWNER, KEPT, QUERY, SCORE, ROOM = (
    tl.constexpr(n) for n in (tables.OWNER, tables.KEPT, tables.QUERY, tables.SCORE, tables.ROOM)
)
# An event's operations.
KIND, LENGTH, SEEN, INDEX, INPUTS, OUTPUT = (
    tl.constexpr(n)
    for n in (
        tables.KIND, tables.LENGTH, tables.SEEN, tables.INDEX, tables.INPUTS, tables.OUTPUT,
    )
)  # fmt: skip
# Query tiles.
TILE_ROW, TILE_TOKENS, TILE_LIST, TILE_STORED, TILE_BIAS = (
    tl.constexpr(n)
    for n in (
        tables.TILE_ROW, tables.TILE_TOKENS, tables.TILE_LIST, tables.TILE_STORED,
        tables.TILE_BIAS,
    )
)  # fmt: skip
TILE_RECENT, TILE_LAST, TILE_REQUEST, TILE_NEEDED = (
    tl.constexpr(n)
    for n in (
        tables.TILE_RECENT, tables.TILE_LAST, tables.TILE_REQUEST, tables.TILE_NEEDED,
    )
)  # fmt: skip
