"""Device functions for logits: scale or soft cap of products q.k, and the sinks of query heads."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_logits(b_dot, logits, C: tl.constexpr):
    """Products q.k to logits in the unit of `logits` (`arguments.Logits`), log-weights left out.

    cap tanh(y) = cap - 2 cap / (exp(2 y) + 1), which is right at both ends, where exp is 0 or inf.
    """
    if C.capped:
        b_logit = logits.cap - 2.0 * logits.cap / (tl.exp2(b_dot * logits.scale) + 1.0)
    else:
        b_logit = b_dot * logits.scale
    return b_logit


@triton.jit
def sink_logits(logits, i_layer, i_head):
    """Sinks of query heads, natural logits whatever the unit."""
    p_sinks = logits.sinks + tl.load(logits.sink_offsets + i_layer)
    return tl.load(p_sinks + i_head).to(tl.float32)
