"""Counter-based random bits: a pure function of (seed, layer, KV head, event position, ...).

Nothing else may feed the algorithm's randomness: not the batch, the chunk, the rank or the time.
The mixing is 32-bit (multiply, xor-shift: the finaliser of MurmurHash3, one round per word), so
that the compiled paths can repeat it bit for bit.
"""

from __future__ import annotations

MASK = 0xFFFFFFFF

#: Streams keep the uses of one event apart.
STREAM_SIGN, STREAM_COMPLEMENT, STREAM_DRAW = 1, 2, 3


def mix(state: int, word: int) -> int:
    """Fold one 32-bit `word` into a 32-bit `state`."""
    h = (state ^ (word & MASK)) & MASK
    h ^= h >> 16
    h = (h * 0x85EBCA6B) & MASK
    h ^= h >> 13
    h = (h * 0xC2B2AE35) & MASK
    h ^= h >> 16
    return (h + 0x9E3779B9) & MASK


def key(seed: int, layer: int, kv_head: int, position: int) -> int:
    """The 32-bit key of one event of one layer and global KV head."""
    state = mix(0, seed)
    for word in (seed >> 32, layer, kv_head, position, position >> 32):
        state = mix(state, word)
    return state


def bits(event_key: int, op: int, stream: int, index: int) -> int:
    """32 random bits for draw `index` of operation `op` in an event."""
    return mix(mix(mix(event_key, op), stream), index)


def uniform(random_bits: int) -> float:
    """A float in [0, 1) that fp32 holds exactly: the upper 24 bits."""
    return (random_bits >> 8) * 2.0**-24
