"""One compaction event of one layer: heavy hitters, halvings and the move, per KV head.

Repeats `express_vllm.reference.cache` in fp32 on a dense working buffer [KV heads, slots, 2 d]
whose rows are key | value.  Each KV head is one task and every reduction has a fixed order, so the
result depends on the head's own rows alone.
"""

from __future__ import annotations

import numpy as np
from numba import carray, cfunc, njit

from express_vllm.layout import Event
from express_vllm.rng import STREAM_COMPLEMENT, STREAM_DRAW, STREAM_SIGN
from express_vllm.schedules import DRAW, Op
from express_vllm.shape import RING_ROWS
from express_vllm.softmax import Softmax

from . import team
from .scalar import as_pointer, fast_exp, fast_tanh, mix, random_bits
from .sinks import row_sinks

_FAST = {"reassoc", "nsz", "arcp", "contract"}
_GAUSSIAN, _EXPONENTIAL, _UNIFORM = 0, 1, 2
KERNELS = {"gaussian": _GAUSSIAN, "exponential": _EXPONENTIAL, "uniform": _UNIFORM}
_DRAW = DRAW
_SIGN, _COMPLEMENT, _DRAWN = STREAM_SIGN, STREAM_COMPLEMENT, STREAM_DRAW
#: log(2 / delta) of the published threshold, delta = 1/2 (reference.halving.DELTA).
_LOG_TWO_OVER_DELTA = np.float32(np.log(4.0))
_ROWS = 4
_OP = np.dtype([(name, np.int64) for name in Op._fields])


@njit(fastmath=_FAST, cache=True)
def attention_mass(rows, slots, log_weight, scale, cap, sinks, mass):
    """Attention that `rows` [R, d] pay to each live slot, summed over rows, into `mass` [live].

    Row r is the query of the token in slot live - R + r and sees slots up to its own; its sink is
    sinks[r].  `cap` 0: none.
    """
    count, live = rows.shape[0], mass.shape[0]
    scores = np.empty((live, count), np.float32)
    if cap > np.float32(0.0):
        _score_rows(rows, slots, np.zeros(live, np.float32), scale, scores)
        inverse = np.float32(1.0) / cap
        for j in range(live):
            for r in range(count):
                scores[j, r] = cap * fast_tanh(scores[j, r] * inverse) + log_weight[j]
    else:
        _score_rows(rows, slots, log_weight, scale, scores)
    for j in range(live - count + 1, live):
        for r in range(j - (live - count)):
            scores[j, r] = np.float32(-3.0e38)
    _sum_shares(scores, sinks, mass)


@njit(fastmath=_FAST, cache=True)
def _score_rows(rows, slots, log_weight, scale, scores):
    """scores[j, r] = scale <row r, key of slot j> + log w_j."""
    count, size = rows.shape
    for j in range(scores.shape[0]):
        key, bias = slots[j], log_weight[j]
        for r in range(0, count, 4):
            s0 = s1 = s2 = s3 = np.float32(0.0)
            row0, row1, row2, row3 = rows[r], rows[r + 1], rows[r + 2], rows[r + 3]
            for c in range(size):
                s0 += row0[c] * key[c]
                s1 += row1[c] * key[c]
                s2 += row2[c] * key[c]
                s3 += row3[c] * key[c]
            scores[j, r] = s0 * scale + bias
            scores[j, r + 1] = s1 * scale + bias
            scores[j, r + 2] = s2 * scale + bias
            scores[j, r + 3] = s3 * scale + bias


@njit(fastmath=_FAST, cache=True)
def _sum_shares(scores, sinks, mass):
    """Softmax of scores [live, R] and sinks [R] over the slots, summed over rows."""
    live, count = scores.shape
    peak = sinks.copy()
    for j in range(live):
        for r in range(count):
            peak[r] = max(peak[r], scores[j, r])
    total = np.empty(count, np.float32)
    for r in range(count):
        total[r] = fast_exp(sinks[r] - peak[r])
    for j in range(live):
        for r in range(count):
            scores[j, r] = fast_exp(scores[j, r] - peak[r])
            total[r] += scores[j, r]
    for r in range(count):
        total[r] = np.float32(1.0) / total[r]
    for j in range(live):
        sum_ = np.float32(0.0)
        for r in range(count):
            sum_ += scores[j, r] * total[r]
        mass[j] = sum_


@njit(cache=True)
def keep_heavy(order, mass, sinks, heavy, incoming_start, incoming):
    """Reorder `order`: the `heavy` heaviest candidates first, the others after the coreset."""
    count = heavy + incoming
    candidates = np.empty(count, np.int64)
    weights = np.empty(count, np.float32)
    for i in range(count):
        slot = sinks + i if i < heavy else incoming_start + i - heavy
        candidates[i] = slot
        weights[i] = -mass[slot]
    ranked = np.argsort(weights, kind="mergesort")
    chosen = np.zeros(count, np.bool_)
    for i in range(heavy):
        chosen[ranked[i]] = True
    coreset = incoming_start - sinks - heavy
    first = sinks
    for i in range(count):
        if chosen[i]:
            order[first] = candidates[i]
            first += 1
    for i in range(coreset):
        order[first + i] = sinks + heavy + i
    first += coreset
    for i in range(count):
        if not chosen[i]:
            order[first] = candidates[i]
            first += 1


@njit(fastmath=_FAST, cache=True)
def halve(slots, order, start, length, kind, event_key, op):
    """Rewrite order[start : start + length/2] with the kept slots of the walk (KH(delta)).

    Pairs are taken four rows (two pairs) at a time; only the upper triangle of the kernel is
    computed and nothing of size length^2 is stored.
    """
    if kind == _UNIFORM:
        for i in range(length // 2):
            coin = np.int64(random_bits(event_key, op, _SIGN, i) & np.uint64(1))
            order[start + i] = order[start + 2 * i + coin]
        return
    size = slots.shape[1] // 2
    keys = np.empty((length, size), np.float32)
    values = np.empty((length, size), np.float32)
    norms = np.empty(length, np.float32)
    bound = _gather(slots, order[start : start + length], kind, keys, values, norms)
    shift = norms.max()
    key_dots = np.empty((_ROWS, length), np.float32)
    value_dots = np.empty((_ROWS, length), np.float32)
    psi = np.zeros(length // 2, np.float32)
    difference = np.empty(length // 2, np.float32)
    largest = np.float32(0.0)
    flip = np.int64(random_bits(event_key, op, _COMPLEMENT, 0) & np.uint64(1))
    for block in range(0, length, _ROWS):
        rows = min(_ROWS, length - block)
        _dots(keys, block, rows, key_dots)
        _dots(values, block, rows, value_dots)
        _kernel_rows(key_dots, value_dots, norms, shift, bound, block, rows, kind, size)
        for r in range(0, rows, 2):
            i = (block + r) // 2
            draw = random_bits(event_key, op, _SIGN, i)
            positive, largest = _sign(
                key_dots[r], key_dots[r + 1], i, kind, draw, largest, psi, difference
            )
            kept = np.int64(1 - np.int64(positive)) ^ flip
            order[start + i] = order[start + 2 * i + kept]


@njit(fastmath=_FAST, cache=True)
def _gather(slots, chosen, kind, keys, values, norms):
    """Keys and values [S, d] of the chosen slots, norms [S] of the keys; -> largest value^2."""
    length, size = keys.shape
    bound = np.float32(0.0)
    for j in range(length):
        row = slots[chosen[j]]
        for c in range(size):
            keys[j, c] = row[c]
            values[j, c] = row[size + c]
        for c in range(size):
            bound = max(bound, abs(row[size + c]))
    if kind == _EXPONENTIAL:
        _centre(keys)
    for j in range(length):
        norm = np.float32(0.0)
        for c in range(size):
            norm += keys[j, c] * keys[j, c]
        norms[j] = norm
    return bound * bound


@njit(fastmath=_FAST, cache=True)
def _kernel_rows(key_dots, value_dots, norms, shift, bound, block, rows, kind, size):
    """Replace the dots of a block's keys by the halving kernel, k(key) (<v, v'> + bound)."""
    length = norms.shape[0]
    scale = np.float32(1.0) / np.sqrt(np.float32(size))
    for r in range(rows):
        dots, weights, norm = key_dots[r], value_dots[r], norms[block + r]
        if kind == _GAUSSIAN:
            for j in range(block, length):
                distance = max(norm + norms[j] - np.float32(2.0) * dots[j], np.float32(0.0))
                dots[j] = fast_exp(np.float32(-0.5) * scale * distance) * (weights[j] + bound)
        else:
            for j in range(block, length):
                exponent = min((dots[j] - shift) * scale, np.float32(0.0))
                dots[j] = fast_exp(exponent) * (weights[j] + bound)


@njit(fastmath=_FAST, cache=True)
def _sign(first, second, i, kind, draw, largest, psi, difference):
    """The sign of pair i, whose kernel rows are `first` and `second`, and the largest root so far;
    `psi` [S / 2] takes what the sign means for later pairs."""
    pairs = psi.shape[0]
    for j in range(i, pairs):
        difference[j] = (first[2 * j] - first[2 * j + 1]) - (second[2 * j] - second[2 * j + 1])
    root = np.sqrt(max(difference[i], np.float32(0.0)))
    largest = max(largest, root)
    factor = np.float32(0.5) + np.log(np.float32(2 * pairs)) + _LOG_TWO_OVER_DELTA
    threshold = root * largest * factor
    if kind == _EXPONENTIAL and threshold > np.float32(0.0):
        ticket = np.float32(draw >> np.uint64(8)) * np.float32(2.0**-23) - np.float32(1.0)
        positive = ticket * threshold > psi[i]
    elif psi[i] == np.float32(0.0):
        positive = draw & np.uint64(1) == np.uint64(1)
    else:
        positive = psi[i] < np.float32(0.0)
    if positive:
        for j in range(i + 1, pairs):
            psi[j] += difference[j]
    else:
        for j in range(i + 1, pairs):
            psi[j] -= difference[j]
    return positive, largest


@njit(fastmath=_FAST, cache=True)
def _centre(keys):
    """Subtract the mean key: softmax does not see it, the exponential kernel's range does."""
    length, size = keys.shape
    for c in range(size):
        mean = np.float32(0.0)
        for j in range(length):
            mean += keys[j, c]
        mean /= np.float32(length)
        for j in range(length):
            keys[j, c] -= mean


@njit(fastmath=_FAST, cache=True)
def _dots(points, block, rows, out):
    """out[r, j] = <x_(block + r), x_j> for j >= block, points [S, d]."""
    length, size = points.shape
    # Past the last row of an incomplete block the last row repeats; its results are not read.
    p0, p1 = points[block], points[block + 1]
    p2, p3 = points[block + min(2, rows - 1)], points[block + rows - 1]
    for j in range(block, length):
        point = points[j]
        s0 = s1 = s2 = s3 = np.float32(0.0)
        for c in range(size):
            s0 += p0[c] * point[c]
            s1 += p1[c] * point[c]
            s2 += p2[c] * point[c]
            s3 += p3[c] * point[c]
        out[0, j], out[1, j], out[2, j], out[3, j] = s0, s1, s2, s3


class _Parameters:
    heads: int
    capacity: int  # slots of source and target
    size: int
    live: int  # slots before the event
    op_count: int
    seed: int
    layer: int
    first_head: int
    position: int
    sinks: int
    heavy: int
    incoming_start: int
    incoming: int
    kind: int  # of the halving kernel
    source: int  # addresses, as all below
    target: int
    rows: int
    log_weight: int
    row_sinks: int
    order: int
    ops: int
    scale: float
    cap: float


_RECORD = team.Record(_Parameters)
_FIELDS = _RECORD.dtype


@njit(cache=True)
def compact_head(source, target, rows, row_sinks, log_weight, order, ops, event_key, event):
    """Run one event, whose sizes are fields of the record `event`: source [slots, 2 d] -> target,
    the kept slots in `order`; -> live slots.  row_sinks [R]: of the query rows [R, d]."""
    live = log_weight.shape[0]
    for j in range(live):
        order[j] = j
    if event.heavy > 0:
        mass = np.empty(live, np.float32)
        attention_mass(rows, source, log_weight, event.scale, event.cap, row_sinks, mass)
        keep_heavy(order, mass, event.sinks, event.heavy, event.incoming_start, event.incoming)
    for index in range(ops.shape[0]):
        op = ops[index]
        start, length = op.start, op.length
        if op.kind == _DRAW:
            order[start] = order[start + _drawn(length, op.seen, event_key, index)]
            kept = 1
        else:
            halve(source, order, start, length, event.kind, event_key, index)
            kept = length // 2
        for j in range(start + length, live):
            order[j - length + kept] = order[j]
        live -= length - kept
    for j in range(live):
        target[j] = source[order[j]]
    return live


@njit(cache=True)
def _drawn(length, seen, event_key, op):
    """`reference.cache.draw`."""
    total = length + (seen - 1 if seen > 0 else 0)
    draw = np.float64(random_bits(event_key, op, _DRAWN, 0) >> np.uint64(8)) * 2.0**-24
    ticket = np.int64(np.floor(draw * total))
    return max(0, ticket - seen + 1) if seen > 0 else ticket


@njit(cache=True)
def _event_key(seed, layer, kv_head, position):
    state = mix(np.uint64(0), seed & np.int64(0xFFFFFFFF))
    state = mix(state, (seed >> np.int64(32)) & np.int64(0xFFFFFFFF))
    state = mix(state, layer)
    state = mix(state, kv_head)
    state = mix(state, position & np.int64(0xFFFFFFFF))
    return mix(state, position >> np.int64(32))


@cfunc(team.SIGNATURE, cache=True)
def _compact(pointer):
    p = carray(pointer, 1, _FIELDS)[0]
    slots = (p.heads, p.capacity, 2 * p.size)
    source = carray(as_pointer(p.source), slots, np.float32)
    target = carray(as_pointer(p.target), slots, np.float32)
    rows = carray(as_pointer(p.rows), (p.heads, RING_ROWS, p.size), np.float32)
    row_sinks = carray(as_pointer(p.row_sinks), (p.heads, RING_ROWS), np.float32)
    log_weight = carray(as_pointer(p.log_weight), p.live, np.float32)
    order = carray(as_pointer(p.order), (p.heads, p.live), np.int64)
    ops = carray(as_pointer(p.ops), p.op_count, _OP)
    while True:
        head = team.claim(pointer)
        if head >= p.tasks:
            return
        key = _event_key(p.seed, p.layer, p.first_head + head, p.position)
        compact_head(
            source[head], target[head], rows[head], row_sinks[head], log_weight, order[head], ops,
            key, p,
        )  # fmt: skip


def operations(event: Event) -> np.ndarray:
    """An event's operations as the kernel reads them, records [n]."""
    return np.array(list(event.ops), _OP)


def compact(
    source, target, rows, log_weight, event_plan, *, seed, layer, first_head, softmax: Softmax,
    kernel,
):  # fmt: skip
    """Run one event for every KV head of a layer.

    source, target: fp32 [KV heads, slots, 2 d], contiguous; the event's live slots are read from
    `source` and what stays is written to `target`.  rows: fp32 [KV heads, RING_ROWS, d], the query
    rows of the positions before the event.  log_weight: fp32 [live before].  event_plan: (event,
    shape, `operations` of it).  Returns the kept slots, int64 [KV heads, live before] (the first
    live_after of each row are valid).
    """
    event, shape, ops = event_plan
    heads, capacity, width = source.shape
    order = np.empty((heads, event.live_before), np.int64)
    sinks = row_sinks(softmax, heads)
    team.run(
        _compact, _RECORD, heads,
        {
            "heads": heads,
            "capacity": capacity,
            "size": width // 2,
            "live": event.live_before,
            "op_count": len(ops),
            "seed": seed,
            "layer": layer,
            "first_head": first_head,
            "position": event.position,
            "sinks": shape.sinks,
            "heavy": shape.heavy,
            "incoming_start": event.incoming_start,
            "incoming": event.incoming,
            "kind": KERNELS[kernel],
            "source": source.ctypes.data,
            "target": target.ctypes.data,
            "rows": rows.ctypes.data,
            "log_weight": log_weight.ctypes.data,
            "row_sinks": sinks.ctypes.data,
            "order": order.ctypes.data,
            "ops": ops.ctypes.data,
            "scale": softmax.scale,
            "cap": softmax.cap,
        },
    )  # fmt: skip
    return order
