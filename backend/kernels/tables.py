"""The columns of a step's device tables, as the host fills them; `columns.py` is the kernels' view.

A step has one table of its *requests*, one of their *events* (each request's follow one another),
and one of its *query tiles*.  What an event does lies in four more arrays, which events with the
same rows share (`events.py`): rounds [n, 2] (first operation, operations), operations, ids, and
`bias`, the log2 weights of stored slots.
"""

from __future__ import annotations

#: A request, int64.  First row of its EVENTS in the event table (INSTANCE) and their number; OLD
#: live slots before the step; SHIFT from a position to its source index; batch row of its first
#: TOKEN; first row in the step's DENSE copy; seed words; block TABLE row; its lists: offset of the
#: first LIST in units of all KV heads, entries of a list (WIDTH), entries KNOWN in the first one;
#: then the state after the step: FINAL_STORED, FINAL_LIVE, token count STOP; first slot of the
#: query RING (-1: none) and the position RING_FROM of its row 0.
(INSTANCE, EVENTS, OLD, SHIFT, TOKEN, DENSE, SEED_LOW, SEED_HIGH, TABLE, LIST, WIDTH, KNOWN,
 FINAL_STORED, FINAL_LIVE, STOP, RING, RING_FROM) = range(17)  # fmt: skip
REQUEST = 17

#: An event of a request, int32.  STORED: slots before the incoming tokens, LIVE: all live slots
#: before the event, AFTER: slots before the exact recent ones after it; ROUND and FINAL are offsets
#: into `rounds` and `ids`, BIAS into `bias`; SINKS and HEAVY hitters of its shape; OWNER: its
#: request; KEPT of its query rows lie in the ring, QUERY: batch row of query row 0 (as if the step
#: held all rows); SCORE: offset of its scores in candidates, of which it has ROOM for a KV head.
(POSITION, STORED, INCOMING, LIVE, AFTER, ROUND, ROUNDS, FINAL, BIAS, SINKS, HEAVY, OWNER, KEPT,
 QUERY, SCORE, ROOM) = range(16)  # fmt: skip
EVENT = 16

#: An operation of an event, int32: INDEX feeds the random bits; INPUTS is an offset into `ids`.
KIND, LENGTH, SEEN, INDEX, INPUTS, OUTPUT = range(6)
OP = 6

#: A query tile, int32: batch row of the first token and TOKENS; its list's offset (as LIST), stored
#: slots, and offset of their log2 weights; source indices of the first exact token and of the
#: first query's own token; request, and how many of its lists must be written.
(TILE_ROW, TILE_TOKENS, TILE_LIST, TILE_STORED, TILE_BIAS, TILE_RECENT, TILE_LAST, TILE_REQUEST,
 TILE_NEEDED) = range(9)  # fmt: skip
TILE = 9
