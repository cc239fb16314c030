"""The server's own metrics during the load: peaks, and a curve of the KV cache."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import httpx

GAUGES = {
    "kv_cache_usage": "vllm:kv_cache_usage_perc",
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "held_tokens": "vllm:express_held_kv_tokens",
    "exact_tokens": "vllm:express_exact_kv_tokens",
}
PREEMPTIONS = "vllm:num_preemptions_total"


@dataclass
class Watch:
    """Polls /metrics until it is cancelled; one point a poll."""

    url: str
    interval: float = 0.5
    points: list[dict[str, float]] = field(default_factory=list)
    preemptions: list[float] = field(default_factory=list)

    async def run(self) -> None:
        start = time.perf_counter()
        async with httpx.AsyncClient(timeout=10) as http:
            while True:
                try:
                    text = (await http.get(f"{self.url}/metrics")).text
                except httpx.HTTPError:
                    text = ""
                if text:
                    self.note(time.perf_counter() - start, text)
                await asyncio.sleep(self.interval)

    def note(self, at: float, text: str) -> None:
        point = {"at": round(at, 2)}
        for name, metric in GAUGES.items():
            values = samples(text, metric)
            if values:
                # The pool's share is each engine's own, everything else adds up.
                point[name] = max(values) if name == "kv_cache_usage" else sum(values)
        self.points.append(point)
        self.preemptions.append(sum(samples(text, PREEMPTIONS)))

    def preempted(self) -> int:
        return round(self.preemptions[-1] - self.preemptions[0]) if self.preemptions else 0


def samples(text: str, metric: str) -> list[float]:
    """The values of a metric's series in the text of /metrics."""
    start = (metric + "{", metric + " ")
    return [float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(start)]
