"""The `vllm:express_` metrics, in vLLM's own registry (docs/metrics.md).

The engine's numbers arrive with vLLM's `SchedulerStats` (scheduler/stats.py); refusals are counted
here, since a refused request never reaches an engine.  The logger goes *before* vLLM's own, so that
they see the statistics without our entry.  It is added when the server starts rather than through
`vllm.stat_logger_plugins`: an entry point there turns vLLM's statistics on for every backend.
"""

from __future__ import annotations

import logging
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from ..budget import MODES
from ..fields import Fields
from ..scheduler.stats import detach
from .errors import on_refusal

logger = logging.getLogger("vllm.express")

LABELS = ("model_name", "engine")
HELD, EXACT, RUNNING = (
    "vllm:express_held_kv_tokens", "vllm:express_exact_kv_tokens", "vllm:express_requests_running",
)  # fmt: skip
#: Why a request can be refused, besides its fields.
REASONS = (
    *Fields.model_fields, "unknown_field", "conflict", "duplicate", "type", "length", "beam_search",
    "route",
)  # fmt: skip
SECONDS = (1e-5, 1e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
RATIOS = (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256)


def token_buckets(longest: int) -> list[int]:
    """Powers of two from 64 to the longest sequence."""
    return [1 << bits for bits in range(6, max(longest, 128).bit_length() + 1)]


class ExpressStatLogger(AggregateStatLoggerBase):
    """Turns the engine's numbers into Prometheus metrics."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
        model = vllm_config.model_config
        self.model_name = model.served_model_name
        self.engines = engine_indexes or [0]
        tokens = token_buckets(model.max_model_len)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, [*LABELS, *labels], multiprocess_mode="mostrecent")

        def histogram(name: str, text: str, buckets: Any) -> Histogram:
            return Histogram(f"vllm:express_{name}", text, LABELS, buckets=buckets)

        self.held = gauge(HELD, "KV memory that running requests hold.")
        self.exact = gauge(EXACT, "KV memory that exact attention would hold.")
        self.running = gauge(RUNNING, "Running requests, by mode.", "mode")
        self.requests = Counter(
            "vllm:express_requests", "Requests that reached the engine.", [*LABELS, "mode"]
        )
        self.compactions = Counter("vllm:express_compactions", "Compactions run.", LABELS)
        self.thinned = Counter(
            "vllm:express_tokens_thinned",
            "Entries that compactions took out of each KV head of an ordinary layer.", LABELS,
        )  # fmt: skip
        self.refused = Counter(
            "vllm:express_refused_requests", "Requests whose budget was refused, by reason.",
            [*LABELS, "reason"],
        )  # fmt: skip
        self.seconds = histogram(
            "compaction_seconds", "Seconds that one step spent compacting.", SECONDS
        )
        self.memory = histogram(
            "memory_tokens", "Memory budgets of requests, as they were granted.", tokens
        )
        self.compute = histogram(
            "compute_tokens", "Compute budgets of requests, as they were granted.", tokens
        )
        self.peak = histogram(
            "peak_kv_tokens", "Most KV memory that a finished request held.", tokens
        )
        self.ratio = histogram(
            "compression_ratio",
            "Tokens stored by a finished request over its peak.",
            RATIOS,
        )
        for engine in self.engines:
            self._show_zeros(engine)

    def _labels(self, engine: int) -> tuple[str, str]:
        return self.model_name, str(engine)

    def _show_zeros(self, engine: int) -> None:
        """Every series from the start, so that rates and dashboards need no first event."""
        labels = self._labels(engine)
        for metric in (
            self.held, self.exact, self.compactions, self.thinned, self.seconds, self.memory,
            self.compute, self.peak, self.ratio,
        ):  # fmt: skip
            metric.labels(*labels)
        for mode in MODES:
            self.running.labels(*labels, mode)
            self.requests.labels(*labels, mode)
        for reason in REASONS:
            self.refused.labels(*labels, reason)

    def refuse(self, reason: str) -> None:
        """Count a refusal, under the first engine: none has seen the request."""
        known = reason if reason in REASONS else "unknown_field"
        self.refused.labels(*self._labels(self.engines[0]), known).inc()

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        payload = detach(scheduler_stats) if scheduler_stats is not None else None
        if payload:
            self._observe(payload, self._labels(engine_idx))

    def _observe(self, payload: dict[str, Any], labels: tuple[str, str]) -> None:
        for mode, memory, compute in payload.get("requests", ()):
            self.requests.labels(*labels, mode).inc()
            self.memory.labels(*labels).observe(memory)
            self.compute.labels(*labels).observe(compute)
        for peak, tokens in payload.get("finished", ()):
            self.peak.labels(*labels).observe(peak)
            self.ratio.labels(*labels).observe(tokens / peak)
        if compactions := payload.get("compactions"):
            self.compactions.labels(*labels).inc(compactions)
            self.thinned.labels(*labels).inc(payload.get("thinned", 0))
        if seconds := payload.get("compaction_seconds"):
            self.seconds.labels(*labels).observe(seconds)
        if "held" in payload:
            self.held.labels(*labels).set(payload["held"])
            self.exact.labels(*labels).set(payload["exact"])
            for mode in MODES:
                self.running.labels(*labels, mode).set(payload["running"].get(mode, 0))

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


def attach_metrics(engine_client: Any, vllm_config: Any) -> None:
    """Put our logger in front of vLLM's; without statistics (--disable-log-stats) do nothing."""
    manager = getattr(engine_client, "logger_manager", None)
    if manager is None:
        logger.info("express: statistics are off, no vllm:express_ metrics")
        return
    ours = ExpressStatLogger(vllm_config, manager.engine_indexes)
    manager.stat_loggers.insert(0, ours)
    on_refusal(ours.refuse)


def read_gauges() -> dict[str, Any]:
    """Slots held and running requests, over all engines, as /metrics shows them."""
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    totals = {HELD: 0, EXACT: 0, RUNNING: 0}
    names = get_prometheus_registry()
    for family in names.collect():
        if family.name in totals:
            totals[family.name] = int(sum(sample.value for sample in family.samples))
    return {
        "held_kv_tokens": totals[HELD], "exact_kv_tokens": totals[EXACT],
        "requests_running": totals[RUNNING],
    }  # fmt: skip
