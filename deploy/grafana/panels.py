"""What the two dashboards show: rows of panels, each with its queries.

`generate.py` turns this into Grafana's JSON, `render.py` draws it from Prometheus alone, and
`queries.py` refuses a query for something that the server does not export.  Grafana fills in
`$model`, `$instance` and `$__rate_interval`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

#: Chosen at the top of every dashboard.
SELECTED = 'model_name=~"$model", instance=~"$instance"'
#: vLLM's HTTP metrics carry no model.
SELECTED_INSTANCE = 'instance=~"$instance"'


@dataclass(frozen=True)
class Query:
    """One PromQL expression and the legend of its series."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """A panel; `kind` is Grafana's name, `unit` one of Grafana's units."""

    title: str
    about: str
    queries: tuple[Query, ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    stack: bool = False
    maximum: float | None = None
    #: (value, colour) from which a value is coloured.
    thresholds: tuple[tuple[float, str], ...] = ()


@dataclass(frozen=True)
class Dashboard:
    uid: str
    title: str
    about: str
    rows: tuple[tuple[str, tuple[Panel, ...]], ...]
    tags: tuple[str, ...] = field(default=("vllm", "express"))


def total(metric: str, by: str = "") -> str:
    return f"sum{_by(by)} ({metric}{{{SELECTED}}})"


def rate(metric: str, by: str = "", labels: str = "") -> str:
    """`labels` select some of the series, beside the dashboard's own choice."""
    chosen = f"{SELECTED}, {labels}" if labels else SELECTED
    return f"sum{_by(by)} (rate({metric}{{{chosen}}}[$__rate_interval]))"


def quantile(q: float, histogram: str) -> str:
    return f"histogram_quantile({q}, {rate(f'{histogram}_bucket', 'le')})"


def mean(histogram: str) -> str:
    return f"{rate(f'{histogram}_sum')} / {rate(f'{histogram}_count')}"


def quantiles(histogram: str, *wanted: float) -> tuple[Query, ...]:
    return tuple(Query(quantile(q, histogram), f"p{round(q * 100)}") for q in wanted)


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""


def stat(title: str, about: str, expr: str, unit: str = "short", **more) -> Panel:
    return Panel(title, about, (Query(expr, title),), unit, "stat", 4, **more)


RED_ABOVE_90 = ((0.8, "orange"), (0.9, "red"))
REFUSED = rate("vllm:express_refused_requests_total")

OVERVIEW = Dashboard(
    "express-overview",
    "Express: overview",
    "Traffic, latency and refusals of vLLM servers that run --attention-backend express.",
    (
        (
            "Now",
            (
                stat(
                    "Servers up",
                    "Servers that Prometheus could scrape.",
                    'sum(up{job="express-vllm", instance=~"$instance"})',
                ),
                stat(
                    "Running",
                    "Requests in the engine's batch.",
                    total("vllm:num_requests_running"),
                ),
                stat(
                    "Waiting",
                    "Requests that wait for blocks or a place in the batch.",
                    total("vllm:num_requests_waiting"),
                    thresholds=((1, "orange"), (20, "red")),
                ),
                stat(
                    "KV cache in use",
                    "Share of the pool's blocks, of the fullest engine.",
                    f"max(vllm:kv_cache_usage_perc{{{SELECTED}}})",
                    "percentunit",
                    maximum=1,
                    thresholds=RED_ABOVE_90,
                ),
                stat(
                    "Generated tokens per second",
                    "Over all servers.",
                    rate("vllm:generation_tokens_total"),
                ),
                stat(
                    "Refused",
                    "Share of requests that were refused for their budget.",
                    f"{REFUSED} / ({REFUSED} + {rate('vllm:express_requests_total')})",
                    "percentunit",
                    maximum=1,
                    thresholds=((0.05, "orange"), (0.25, "red")),
                ),
            ),
        ),
        (
            "Traffic",
            (
                Panel(
                    "Requests per second",
                    "Accepted requests by mode.",
                    (Query(rate("vllm:express_requests_total", "mode"), "{{mode}}"),),
                    "reqps",
                    stack=True,
                ),
                Panel(
                    "Running and waiting",
                    "Running requests by mode, and all that wait.",
                    (
                        Query(total("vllm:express_requests_running", "mode"), "{{mode}}"),
                        Query(total("vllm:num_requests_waiting"), "waiting"),
                    ),
                ),
                Panel(
                    "Refused requests per second",
                    "Budgets outside what the operator allows, by reason.",
                    (
                        Query(
                            f"{rate('vllm:express_refused_requests_total', 'reason')} > 0",
                            "{{reason}}",
                        ),
                    ),
                    "reqps",
                    stack=True,
                ),
                Panel(
                    "Tokens per second",
                    "Prompt tokens, cached ones included, and tokens generated.",
                    (
                        Query(rate("vllm:prompt_tokens_total"), "prompt"),
                        Query(rate("vllm:generation_tokens_total"), "generated"),
                    ),
                ),
                Panel(
                    "Finished requests per second",
                    "By the reason why they ended.",
                    (
                        Query(
                            f"{rate('vllm:request_success_total', 'finished_reason')} > 0",
                            "{{finished_reason}}",
                        ),
                    ),
                    "reqps",
                    stack=True,
                ),
                Panel(
                    "HTTP responses per second",
                    "By status; 4xx holds the refused budgets.",
                    (
                        Query(
                            "sum by (status) (rate(http_requests_total"
                            f"{{{SELECTED_INSTANCE}}}[$__rate_interval]))",
                            "{{status}}",
                        ),
                    ),
                    "reqps",
                    stack=True,
                ),
            ),
        ),
        (
            "Latency",
            (
                Panel(
                    "Time to first token",
                    "Waiting in the queue included.",
                    quantiles("vllm:time_to_first_token_seconds", 0.5, 0.95, 0.99),
                    "s",
                ),
                Panel(
                    "Time per output token",
                    "Mean of each request after its first token.",
                    quantiles("vllm:request_time_per_output_token_seconds", 0.5, 0.95, 0.99),
                    "s",
                ),
                Panel(
                    "Whole request",
                    "From arrival to the last token.",
                    quantiles("vllm:e2e_request_latency_seconds", 0.5, 0.95),
                    "s",
                ),
                Panel(
                    "Queue",
                    "Time before a request first ran.",
                    quantiles("vllm:request_queue_time_seconds", 0.5, 0.95),
                    "s",
                ),
                Panel(
                    "Prompt and answer length",
                    "Mean tokens of finished requests.",
                    (
                        Query(mean("vllm:request_prompt_tokens"), "prompt"),
                        Query(mean("vllm:request_generation_tokens"), "answer"),
                    ),
                ),
                Panel(
                    "Preemptions per second",
                    "Requests that lost their blocks, and start again from what the prefix cache "
                    "still has: the pool is too small.",
                    (Query(rate("vllm:num_preemptions_total"), "preemptions"),),
                ),
            ),
        ),
    ),
)

HELD, EXACT = total("vllm:express_held_kv_tokens"), total("vllm:express_exact_kv_tokens")
COMPACTING = rate("vllm:express_compaction_seconds_sum")
COMPUTED = rate("vllm:prompt_tokens_by_source_total", labels='source="local_compute"')
HITS, QUERIES = (rate(f"vllm:prefix_cache_{name}_total") for name in ("hits", "queries"))

MEMORY = Dashboard(
    "express-memory",
    "Express: memory and compression",
    "KV memory held against what exact attention would hold, budgets, and the cost of compaction.",
    (
        (
            "KV cache",
            (
                Panel(
                    "KV memory",
                    "Held by running requests, and what exact attention would hold for them.",
                    (Query(HELD, "held"), Query(EXACT, "exact attention would hold")),
                    width=12,
                ),
                Panel(
                    "Held of exact",
                    "Lower saves more. Above 100% just before a request's first compaction, when "
                    "its last slots are reserved.",
                    (Query(f"{HELD} / ({EXACT} > 0)", "held / exact"),),
                    "percentunit",
                    width=12,
                ),
                Panel(
                    "KV cache in use",
                    "Share of the pool's blocks, by engine.",
                    (
                        Query(
                            f"max by (instance, engine) (vllm:kv_cache_usage_perc{{{SELECTED}}})",
                            "{{instance}} engine {{engine}}",
                        ),
                    ),
                    "percentunit",
                    maximum=1,
                    thresholds=RED_ABOVE_90,
                ),
                Panel(
                    "Memory per running request",
                    "Held by a running request, on average.",
                    (Query(f"{HELD} / ({total('vllm:num_requests_running')} > 0)", "tokens"),),
                ),
                Panel(
                    "Peak memory of finished requests",
                    "The most that a request ever held.",
                    quantiles("vllm:express_peak_kv_tokens", 0.5, 0.95, 0.99),
                ),
            ),
        ),
        (
            "Budgets",
            (
                Panel(
                    "Memory budgets",
                    "Memory and compute budgets of requests, as they were granted.",
                    quantiles("vllm:express_memory_tokens", 0.5, 0.95),
                ),
                Panel(
                    "Compute budgets",
                    "Entries that a token may attend to.",
                    quantiles("vllm:express_compute_tokens", 0.5, 0.95),
                ),
                Panel(
                    "Compression of finished requests",
                    "Tokens stored over the most memory held: at 1 nothing is saved.",
                    (
                        # Never below 1, where the interpolation of the first bucket would go.
                        *(
                            Query(f"clamp_min({query.expr}, 1)", query.legend)
                            for query in quantiles("vllm:express_compression_ratio", 0.5, 0.95)
                        ),
                        Query(mean("vllm:express_compression_ratio"), "mean"),
                    ),
                ),
            ),
        ),
        (
            "Prefix cache",
            (
                Panel(
                    "Hit rate",
                    "Share of prompt tokens that requests found cached, as blocks or as states. "
                    "Nothing is drawn while no request arrives, or with prefix caching off.",
                    (Query(f"{HITS} / ({QUERIES} > 0)", "hits / queries"),),
                    "percentunit",
                    maximum=1,
                ),
                Panel(
                    "Prompt tokens per second",
                    "Found in the prefix cache, and computed.",
                    (
                        Query(rate("vllm:prompt_tokens_cached_total"), "cached"),
                        Query(COMPUTED, "computed"),
                    ),
                    stack=True,
                ),
                Panel(
                    "Room for cached states",
                    "Share of the pool's blocks that no request uses, by engine. Cached states lie "
                    "there, and go when requests need the blocks.",
                    (
                        Query(
                            "1 - max by (instance, engine) "
                            f"(vllm:kv_cache_usage_perc{{{SELECTED}}})",
                            "{{instance}} engine {{engine}}",
                        ),
                    ),
                    "percentunit",
                    maximum=1,
                ),
            ),
        ),
        (
            "Compaction",
            (
                Panel(
                    "Share of time",
                    "Seconds spent compacting per second, by engine.",
                    (
                        Query(
                            rate("vllm:express_compaction_seconds_sum", "instance, engine"),
                            "{{instance}} engine {{engine}}",
                        ),
                    ),
                    "percentunit",
                    thresholds=((0.25, "orange"), (0.5, "red")),
                ),
                Panel(
                    "Compactions per second",
                    "Events of all requests.",
                    (Query(rate("vllm:express_compactions_total"), "compactions"),),
                ),
                Panel(
                    "Tokens thinned per second",
                    "Tokens that lost their own slot, against all tokens that were computed: those "
                    "of the prefix cache are not.",
                    (
                        Query(rate("vllm:express_tokens_thinned_total"), "thinned"),
                        Query(
                            f"{COMPUTED} + {rate('vllm:generation_tokens_total')}",
                            "prompt and generated",
                        ),
                    ),
                ),
                Panel(
                    "Compaction in a step",
                    "Seconds of a step that compacts.",
                    quantiles("vllm:express_compaction_seconds", 0.5, 0.95, 0.99),
                    "s",
                    width=12,
                ),
                Panel(
                    "Time per compaction",
                    "Mean seconds per event.",
                    (
                        Query(
                            f"{COMPACTING} / ({rate('vllm:express_compactions_total')} > 0)",
                            "seconds",
                        ),
                    ),
                    "s",
                    width=12,
                ),
            ),
        ),
    ),
)

DASHBOARDS = (OVERVIEW, MEMORY)
