"""Honest start-up: vLLM's seams, refusals with reasons, nothing touched when unused."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from express_vllm import cli, conflicts
from express_vllm.plugin import BACKEND_NAME, register

ROOT = Path(__file__).parent.parent


def engine_config(model_path, **arguments):
    """The VllmConfig that `vllm serve` would make, without starting an engine."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(model_path), max_model_len=2048, **arguments).create_engine_config()


def test_the_plugin_is_registered():
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    register()
    assert type(current_platform).__name__ == "ExpressCpuPlatform"
    assert AttentionBackendEnum[BACKEND_NAME].get_path().endswith("ExpressBackend")


def test_the_backend_name_unpickles_in_a_process_without_plugins():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    blob = pickle.dumps(AttentionBackendEnum[BACKEND_NAME])
    code = "import pickle, sys; print(pickle.loads(bytes.fromhex(sys.argv[1])).name)"
    environment = {**os.environ, "VLLM_PLUGINS": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, blob.hex()], text=True, capture_output=True, env=environment
    )
    assert done.stdout.strip().endswith(BACKEND_NAME), done.stderr


def test_express_chooses_scheduler_and_worker(model_path):
    config = engine_config(model_path, attention_backend="express")
    assert config.scheduler_config.scheduler_cls.endswith("ExpressScheduler")
    assert config.parallel_config.worker_cls.endswith("ExpressCPUWorker")
    assert config.cache_config.enable_prefix_caching is False


def test_other_backends_are_untouched(model_path):
    config = engine_config(model_path)
    assert config.scheduler_config.scheduler_cls is None or "express" not in str(
        config.scheduler_config.scheduler_cls
    )
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert config.cache_config.enable_prefix_caching is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kv_cache_dtype": "fp8"}, ["quantized KV cache", "--kv-cache-dtype"]),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2,
                                    "prompt_lookup_max": 3}},
            ["speculative decoding", "--speculative-config"],
        ),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            ["KV connectors", "--kv-transfer-config"],
        ),
        (
            {"additional_config": {"express": {"memory_tokens": 7}}},
            ["express.memory_tokens", "7", "128"],
        ),
        (
            {"additional_config": {"express": {"memory": 512}}},
            ["express.memory", "did you mean memory_tokens"],
        ),
    ],
)  # fmt: skip
def test_conflicts_stop_the_start(model_path, arguments, words):
    with pytest.raises(Exception, match=r".") as error:
        engine_config(model_path, attention_backend="express", **arguments)
    for word in words:
        assert word in str(error.value)


def test_explicit_prefix_caching_is_refused(model_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "m", "--enable-prefix-caching"])
    with pytest.raises(Exception, match=r"prefix caching.*drop --enable-prefix-caching"):
        engine_config(model_path, attention_backend="express")


def _fake_config(**changes):
    """A configuration with every conflicting feature off, and `changes` applied by dotted path."""
    config = SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype="auto", kv_offloading_size=None),
        kv_transfer_config=None, speculative_config=None, kv_events_config=None,
        use_v2_model_runner=False,
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
        model_config=SimpleNamespace(
            use_mla=False, is_encoder_decoder=False, is_hybrid=False, is_attention_free=False,
            runner_type="generate",
        ),
    )  # fmt: skip
    for path, value in changes.items():
        owner, _, name = path.rpartition(".")
        setattr(getattr(config, owner) if owner else config, name, value)
    return config


@pytest.mark.parametrize(
    ("path", "value", "feature"),
    [
        ("cache_config.kv_offloading_size", 4.0, "KV offloading"),
        ("parallel_config.decode_context_parallel_size", 2, "decode context parallelism"),
        ("parallel_config.prefill_context_parallel_size", 2, "prefill context parallelism"),
        ("model_config.use_mla", True, "MLA models"),
        ("model_config.is_encoder_decoder", True, "encoder-decoder models"),
        ("model_config.is_hybrid", True, "attention-free and hybrid state models"),
        ("model_config.runner_type", "pooling", "pooling models"),
        ("use_v2_model_runner", True, "Model Runner V2 on CPUs, V1 on GPUs"),
        ("kv_events_config", SimpleNamespace(enable_kv_cache_events=True), "KV events"),
    ],
)
def test_each_conflict_is_seen(path, value, feature):
    assert conflicts.find_conflicts(_fake_config()) == []
    (found,) = conflicts.find_conflicts(_fake_config(**{path: value}))
    assert found.feature == feature


@pytest.mark.parametrize(("newer", "refused"), [("0", True), ("1", False)])
def test_rays_older_executor_is_refused(monkeypatch, newer, refused):
    """It calls the model runner itself: no step would know its budgets."""
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", newer)
    ray = _fake_config(**{"parallel_config.distributed_executor_backend": "ray"})
    assert [c.feature for c in conflicts.find_conflicts(ray)] == ["Ray's older executor"] * refused


def test_the_attributes_that_conflicts_read_exist_in_vllm(model_path):
    """A renamed attribute would switch a refusal off silently."""
    config = engine_config(model_path)
    for path in (
        "cache_config.cache_dtype", "cache_config.kv_offloading_size", "kv_transfer_config",
        "speculative_config", "parallel_config.decode_context_parallel_size",
        "parallel_config.prefill_context_parallel_size",
        "parallel_config.distributed_executor_backend", "model_config.use_mla",
        "model_config.is_encoder_decoder", "model_config.is_hybrid",
        "model_config.is_attention_free", "model_config.runner_type", "kv_events_config",
        "additional_config", "attention_config.backend", "use_v2_model_runner",
    ):  # fmt: skip
        owner = config
        for name in path.split("."):
            assert hasattr(owner, name), f"vLLM has no {path} any more"
            owner = getattr(owner, name)


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("has_sliding_window", True, "sliding-window"),
        ("has_sink", True, "attention sinks"),
        ("use_mla", True, "sparse"),
        ("use_mm_prefix", True, "multimodal"),
        ("attn_type", "encoder", "encoder"),
    ],
)
def test_layers_are_refused(field, value, word):
    from vllm.v1.attention.backend import AttentionType

    from express_vllm.backend.attention import ExpressBackend

    plain = {
        "has_sliding_window": False, "has_sink": False, "use_mla": False, "use_sparse": False,
        "use_mm_prefix": False, "attn_type": AttentionType.DECODER,
    }  # fmt: skip
    ExpressBackend.check_layer(SimpleNamespace(**plain))
    with pytest.raises(conflicts.ConflictError, match=word):
        ExpressBackend.check_layer(SimpleNamespace(**{**plain, field: value}))


@pytest.mark.parametrize(
    ("owner", "method", "arguments"),
    [
        ("vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager",
         "get_num_blocks_to_allocate",
         ["request_id", "num_tokens", "new_computed_blocks", "total_computed_tokens",
          "num_local_computed_tokens", "num_tokens_main_model", "apply_admission_cap",
          "prefill_end"]),
        ("vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager",
         "allocate_new_blocks", ["request_id", "num_tokens", "num_tokens_main_model"]),
        ("vllm.v1.core.sched.scheduler:Scheduler", "add_request", ["request"]),
        ("vllm.v1.core.sched.scheduler:Scheduler", "_free_blocks", ["request"]),
        ("vllm.v1.core.sched.scheduler:Scheduler", "schedule", ["throttle_prefills"]),
        ("vllm.v1.worker.cpu_worker:CPUWorker", "execute_model", ["scheduler_output"]),
        ("vllm.v1.worker.cpu_worker:CPUWorker", "get_kv_cache_spec", []),
        ("vllm.platforms.interface:Platform", "validate_request", ["processed_inputs", "params"]),
        ("vllm.platforms.interface:Platform", "get_attn_backend_cls",
         ["selected_backend", "attn_selector_config", "num_heads"]),
        ("vllm.v1.attention.backend:AttentionMetadataBuilder", "build",
         ["common_prefix_len", "common_attn_metadata", "fast_build"]),
        ("vllm.v1.attention.backend:AttentionBackend", "customize_spec", ["spec"]),
    ],
)  # fmt: skip
def test_the_methods_that_we_override_have_not_changed(owner, method, arguments):
    module, _, name = owner.partition(":")
    function = getattr(getattr(__import__(module, fromlist=[name]), name), method)
    names = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
    assert names == arguments, f"{owner}.{method} changed: adapt our override"


def test_the_scheduler_uses_the_hooks_that_we_override():
    """Names that are not part of a documented interface, by their use in vLLM's source."""
    from vllm.v1.core.sched import scheduler
    from vllm.v1.engine import input_processor

    source = inspect.getsource(scheduler)
    assert "self._free_blocks(request)" in source
    assert "current_platform.validate_request(" in inspect.getsource(input_processor)


def test_doctor_reports_a_ready_installation(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor"])
    text = capsys.readouterr().out
    assert stop.value.code == 0, text
    assert "ExpressCpuPlatform" in text and "NO:" not in text
    assert "speculative decoding" in text


def test_check_explains_a_configuration(capsys):
    good = json.dumps({"express": {"memory_tokens": 1024}})
    for text, code in ((good, 0), ('{"express": {"memory_tokens": 3}}', 1), ("{", 1)):
        with pytest.raises(SystemExit) as stop:
            cli.main(["check", text])
        assert stop.value.code == code
    assert "refused: express.memory_tokens=3" in capsys.readouterr().out


def test_the_conflict_matrix_is_current():
    page = ROOT / "docs" / "conflicts.md"
    assert page.read_text() == conflicts.matrix(), "express-vllm conflicts > docs/conflicts.md"
