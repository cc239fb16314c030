"""How tight the published bounds are: entries held against 6 n_out, error against log^1.5(n) / s.

Express Language Modeling (arXiv 2606.10944) bounds the error of an output's coordinates by
O(log^1.5(n) / s) and the coreset by 6 n_out entries.  Random queries, keys and values put every
token to use, unlike text; the caches have no heavy hitters and the smallest window, so that the
error is that of the coreset.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from express_vllm.layout import layout_for, make_shape

from .caches import ExactCache
from .harness import Heads
from .policies import Policy
from .progress import Progress

#: Cache -> policy.  `even` keeps old tokens as dense as these inputs need them.
SIZES = "sinks=0,window=32,interval=32"
CACHES = {
    "published Express": f"express:schedule=paper,{SIZES}",
    "its schedule, coins": f"uniform:schedule=paper,{SIZES}",
    "lazy, greedy signs": f"express:heavy=0,profile=even,{SIZES}",
    "lazy, coins": f"uniform:profile=even,{SIZES}",
}
SLOTS = (256, 512, 1024, 2048)
LENGTHS = (4096, 16384)
#: Independent heads of a run, and the last positions whose outputs are compared.
HEADS, POSITIONS, SIZE = 8, 64, 64
#: Tokens over which the peak of the published coreset is looked for.
FAR = 1 << 20


def measure(
    slots: Sequence[int] = SLOTS, lengths: Sequence[int] = LENGTHS, seed: int = 0
) -> list[dict[str, Any]]:
    """A row per cache, slots and length: mean over the heads of the largest error of a coordinate,
    as a part of the largest value's."""
    heads = Heads(1, HEADS, HEADS, SIZE, SIZE**-0.5, None, None)
    rows = [{"what": "peak", "slots": n, **peak(n)} for n in slots]
    with Progress("bound", len(lengths) * len(slots) * len(CACHES)) as progress:
        for length in lengths:
            generator = torch.Generator().manual_seed(seed)
            inputs = torch.randn(3, 1, HEADS, length, SIZE, generator=generator)
            exact = ExactCache(heads).attend(*inputs)[:, :, -POSITIONS:]
            for n in slots:
                for name, text in CACHES.items():
                    progress.say(f"{name} {n} {length}")
                    (cache,) = Policy.parse(text, n).caches(heads, seed)
                    ours = cache.attend(*inputs)[:, :, -POSITIONS:]
                    worst = (ours - exact).abs().amax((0, 2, 3)) / inputs[2].abs().amax((0, 2, 3))
                    rows.append({"what": "error", "policy": name, "slots": n, "length": length,
                                 "errors": [round(float(x), 6) for x in worst]})  # fmt: skip
                    progress.step()
    return rows


def peak(slots: int) -> dict[str, Any]:
    """n_out of the published schedule and the most entries that its coreset holds."""
    shape = make_shape(slots, schedule="paper", sinks=0, window=32, interval=32)
    layout = layout_for(shape)
    most = max(e.live_before for e in layout.events(0, FAR)) - shape.window - shape.interval
    return {"n_out": shape.target, "most": most}


def constant(error: float, slots: int, length: int) -> float:
    """C of error = C log^1.5(n) / s."""
    return error * slots / math.log(length) ** 1.5
