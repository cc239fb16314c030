"""`Chunk`: what a step does for one request; nothing of vLLM and of devices."""

from __future__ import annotations

from dataclasses import dataclass

from express_vllm.layout import Layout


@dataclass
class Chunk:
    """Tokens [start, stop) of a request: batch rows from `token` on, block-table row `row`."""

    layout: Layout
    start: int
    stop: int
    token: int = 0
    row: int = 0
    seed: int = 0
