"""The engine's counting without an engine, and the path by which it reaches an API server."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
from budgets import EQUAL, resolve
from hypothesis import given, settings
from hypothesis import strategies as st

from express_vllm.config import ServerConfig
from express_vllm.scheduler.stats import NAME, EngineStats, Tracked, attach, detach

CONFIG = ServerConfig(memory_tokens=256, max_memory_tokens=4096)


def budget(prompt=3000, max_tokens=100, **fields):
    arguments = {f"express_{name}": value for name, value in fields.items()}
    return resolve(
        arguments, CONFIG, prompt_tokens=prompt, max_tokens=max_tokens, max_model_len=8192
    )


@settings(deadline=None)
@given(st.lists(st.integers(1, 700), min_size=1, max_size=12))
def test_chunks_of_any_size_count_the_same_compactions(chunks):
    found = budget(prompt=8000)
    tracked, at = Tracked(found), 0
    compactions = thinned = 0
    for size in chunks:
        more, out = tracked.advance(at, at + size)
        compactions, thinned, at = compactions + more, thinned + out, at + size
    events = found.layout.events(0, at)
    assert compactions == len(events)
    assert thinned == at - found.layout.live(at), "what is not live any more was thinned out"
    assert tracked.most == at


def test_a_preempted_request_compacts_again_and_keeps_its_peak():
    found = budget()
    tracked = Tracked(found)
    first = tracked.advance(0, 1000)
    assert first == (len(found.layout.events(0, 1000)), 1000 - found.layout.live(1000))
    assert tracked.advance(0, 500)[0] == len(found.layout.events(0, 500))
    assert tracked.most == 1000
    assert tracked.advance(500, 1000)[0] == len(found.layout.events(500, 1000))
    assert tracked.most == 1000


def test_exact_requests_never_compact():
    assert Tracked(budget(mode="exact", prompt=500)).advance(0, 600) == (0, 0)


def test_what_happened_is_reported_once():
    stats, found = EngineStats(EQUAL), budget()
    tracked = Tracked(found)
    stats.arrived(found)
    stats.advanced(*tracked.advance(0, 3000))
    stats.compaction_seconds += 0.5
    stats.left(tracked)
    first = stats.take(False, [])
    events = found.layout.events(0, 3000)
    assert first == {
        "requests": [("express", 256, 256)], "finished": [(256, 3000)],
        "compactions": len(events), "thinned": 3000 - found.layout.live(3000),
        "compaction_seconds": 0.5, "held": 0, "exact": 0, "running": {},
    }  # fmt: skip
    assert stats.take(False, []) == {"held": 0, "exact": 0, "running": {}}


def test_gauges_are_of_the_running_requests():
    stats = EngineStats(EQUAL)
    exact = budget(mode="exact", prompt=500)
    pairs = [(budget(), 3000), (budget(), 100), (exact, 400)]
    found = stats.take(True, pairs)
    assert found == {"held": 256 + 100 + 400, "exact": 3500, "running": {"express": 2, "exact": 1}}
    assert stats.take(True, pairs) == {}, "not again in the same moment"
    assert stats.take(False, [])["held"] == 0, "but at once when the last request has left"


def test_a_request_that_never_ran_has_no_peak():
    stats = EngineStats(EQUAL)
    stats.left(Tracked(budget()))
    assert "finished" not in stats.take(False, [])


def test_nothing_piles_up_without_statistics():
    stats, tracked = EngineStats(EQUAL, enabled=False), Tracked(budget())
    tracked.advance(0, 10)
    stats.arrived(budget())
    stats.left(tracked)
    assert not stats.requests and not stats.finished


# --- contract with vLLM -------------------------------------------------------------------------


def scheduler_stats(payload):
    from vllm.v1.metrics.stats import SchedulerStats

    stats = SchedulerStats(num_running_reqs=1)
    attach(stats, payload)
    return stats


def test_the_numbers_survive_vllms_wire_format():
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    payload = {"held": 512, "finished": [[256, 3000]], "compaction_seconds": 0.25}
    outputs = EngineCoreOutputs(scheduler_stats=scheduler_stats(payload))
    frames = MsgpackEncoder().encode(outputs)
    again = MsgpackDecoder(EngineCoreOutputs).decode(frames).scheduler_stats
    assert detach(again) == payload
    assert detach(again) is None and not again.num_kv_fetch_reqs_by_stage


def test_vllms_own_loggers_live_with_our_entry(model_path, monkeypatch):
    """Where our logger is missing (offline engines), theirs see the entry and must not mind."""
    from engines import engine_config
    from vllm.v1.metrics import loggers
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    config = engine_config(model_path, attention_backend="express")
    lines = []
    for level in ("info", "debug"):  # it says little about an idle engine
        monkeypatch.setattr(
            loggers.logger, level, lambda text, *values: lines.append(text % values)
        )
    try:
        text = loggers.LoggingStatLogger(config, 0)
        for logger in (text, loggers.PrometheusStatLogger(config, [0])):
            logger.record(scheduler_stats({"held": 1}), None)
        text.log()
    finally:
        unregister_vllm_metrics()
    assert any("Running: 1 reqs" in line for line in lines)
    assert not any(NAME in line or "KV fetch" in line for line in lines)


def test_the_hooks_that_carry_the_numbers_exist():
    from vllm.platforms.interface import Platform
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerManager

    assert list(inspect.signature(Scheduler.update_from_output).parameters) == [
        "self", "scheduler_output", "model_runner_output",
    ]  # fmt: skip
    assert "self.make_stats(" in inspect.getsource(Scheduler.update_from_output)
    assert "for stat_logger in self.stat_loggers:" in inspect.getsource(StatLoggerManager.record)
    assert "self.logger_manager" in inspect.getsource(AsyncLLM.__init__)
    assert "parser" in inspect.signature(Platform.pre_register_and_update).parameters


def test_the_logger_counts_what_it_is_told(model_path):
    from engines import engine_config
    from prometheus_client import REGISTRY
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    from express_vllm.server.metrics import ExpressStatLogger

    unregister_vllm_metrics()
    config = engine_config(model_path, attention_backend="express")
    logger = ExpressStatLogger(config, [0, 1])
    try:
        labels = {"model_name": config.model_config.served_model_name, "engine": "1"}

        def value(name, **more):
            return REGISTRY.get_sample_value(f"vllm:express_{name}", {**labels, **more})

        assert value("compactions_total") == 0, "every series is there from the start"
        payload = {
            "requests": [["exact", 512, 256]], "finished": [[256, 3072]], "compactions": 3,
            "thinned": 90, "compaction_seconds": 0.5, "held": 7, "exact": 70,
            "running": {"exact": 2},
        }  # fmt: skip
        logger.record(scheduler_stats(payload), None, engine_idx=1)
        logger.record(None, None, engine_idx=1)
        assert value("held_kv_tokens") == 7 and value("exact_kv_tokens") == 70
        assert value("requests_running", mode="exact") == 2
        assert value("requests_running", mode="express") == 0
        assert value("requests_total", mode="exact") == 1
        assert value("compactions_total") == 3 and value("tokens_thinned_total") == 90
        for name, total in (
            ("compaction_seconds", 0.5), ("memory_tokens", 512),
            ("compute_tokens", 256), ("peak_kv_tokens", 256), ("compression_ratio", 12),
        ):  # fmt: skip
            assert value(f"{name}_sum") == total and value(f"{name}_count") == 1
        logger.refuse("seed")
        logger.refuse("anything else")
        labels["engine"] = "0"
        assert value("refused_requests_total", reason="seed") == 1
        assert value("refused_requests_total", reason="unknown_field") == 1
        assert value("compactions_total") == 0, "the other engine has its own series"
    finally:
        unregister_vllm_metrics()


def test_without_vllms_statistics_there_are_no_metrics():
    from express_vllm.server.metrics import attach_metrics

    attach_metrics(SimpleNamespace(logger_manager=None), None)


def test_our_logger_goes_before_vllms(model_path):
    from engines import engine_config
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    from express_vllm.server.metrics import ExpressStatLogger, attach_metrics

    config = engine_config(model_path, attention_backend="express")
    manager = StatLoggerManager(config, [0])
    try:
        attach_metrics(SimpleNamespace(logger_manager=manager), config)
        assert isinstance(manager.stat_loggers[0], ExpressStatLogger)
        stats = scheduler_stats({"held": 5, "exact": 9, "running": {}})
        manager.record(stats, None)
        assert not stats.num_kv_fetch_reqs_by_stage, "taken out before vLLM's loggers"
    finally:
        unregister_vllm_metrics()


def test_seconds_travel_on_the_models_output():
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

    from express_vllm.backend import timing
    from express_vllm.scheduler.stats import COMPACTION_SECONDS

    timing.take()
    timing.add(0.25)
    timing.add(0.5)
    assert timing.stamp(EMPTY_MODEL_RUNNER_OUTPUT) is EMPTY_MODEL_RUNNER_OUTPUT
    assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, COMPACTION_SECONDS)
    output = timing.stamp(ModelRunnerOutput(req_ids=[], req_id_to_index={}))
    assert getattr(output, COMPACTION_SECONDS) == 0.75
    assert timing.take() == 0
    assert timing.stamp(None) is None


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
