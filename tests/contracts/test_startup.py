"""Honest start-up: vLLM's seams, refusals with reasons, nothing touched when unused."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import random_families
import torch
from engines import engine_config

from express_vllm import cli, conflicts
from express_vllm.patches import PATCHED
from express_vllm.plugin import BACKEND_NAME, register
from express_vllm.settings import Settings
from express_vllm.shape import MAX_TOKENS

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"VLLM_TARGET_DEVICE": "cpu"}, "vLLM chose the platform CpuPlatform"),
        ({"TEST_VLLM_VERSION": "0.99.0"}, "tested with vLLM 0.32.*, not with 0.99.0"),
    ],
)
def test_without_its_platform_the_backend_is_off_and_says_why(environment, words):
    """Else vLLM would serve the model with another backend and one line of information."""
    code = """
import os
from importlib import metadata
if version := os.environ.get("TEST_VLLM_VERSION"):
    real = metadata.version
    metadata.version = lambda name: version if name == "vllm" else real(name)
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum
load_general_plugins()
print("EXPRESS" in AttentionBackendEnum.__members__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], text=True, capture_output=True, env=os.environ | environment
    )
    assert done.stdout.strip().endswith("False"), done.stderr
    (line,) = [x for x in (done.stdout + done.stderr).splitlines() if "express is off" in x]
    assert words in line


def test_express_chooses_scheduler_and_worker(model_path):
    config = engine_config(model_path, attention_backend="express")
    assert config.scheduler_config.scheduler_cls.endswith("ExpressScheduler")
    assert config.parallel_config.worker_cls.endswith("ExpressCPUWorker")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A model with sliding windows."""
    return random_families.write(tmp_path_factory.mktemp("gemma3"), "gemma3")


def test_a_model_with_windows_starts_without_prefix_caching(gemma):
    config = engine_config(gemma, attention_backend="express")
    assert config.cache_config.enable_prefix_caching is False
    settings = Settings.of(config)
    assert settings.size.layers == len(settings.layers.growing) == 4
    own = engine_config(gemma)
    assert own.cache_config.enable_prefix_caching is True


def test_a_model_with_states_has_blocks_as_without_prefix_caching(tmp_path):
    granite = random_families.write(tmp_path, "granite4")
    found = engine_config(granite, attention_backend="express").cache_config
    own = engine_config(granite, enable_prefix_caching=False).cache_config
    for name in ("enable_prefix_caching", "mamba_cache_mode", "mamba_block_size"):
        assert getattr(found, name) == getattr(own, name)


def test_wide_layers_beside_windows_are_refused(gemma):
    express = {"express": {"wide_layers": [1]}}
    with pytest.raises(Exception, match=r"express\.wide_layers=\[1\].*must be \[\]"):
        engine_config(gemma, attention_backend="express", additional_config=express)


def test_windows_get_vllms_own_backend(gemma):
    """Chunked layers, too, which do not say so to the platform."""
    from vllm.model_executor.layers.attention import chunked_local_attention
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    engine_config(gemma, attention_backend="express")
    ours = AttentionBackendEnum[BACKEND_NAME]
    plain = AttentionSelectorConfig(64, torch.float32, "auto", None)
    for layer, name in (
        (plain, "ExpressBackend"),
        (plain._replace(has_sliding_window=True), "CPUAttentionBackend"),
    ):
        assert current_platform.get_attn_backend_cls(ours, layer).endswith(name)
    asked = chunked_local_attention.get_attn_backend
    assert hasattr(asked, PATCHED)
    assert "has_sliding_window" in inspect.signature(asked.__wrapped__).parameters
    source = inspect.getsource(chunked_local_attention.ChunkedLocalAttention.__init__)
    assert "= get_attn_backend(head_size, dtype, kv_cache_dtype)" in source


@pytest.mark.parametrize("asked", [None, True, False])
def test_prefix_caching_is_vllms_own_setting(model_path, asked):
    config = engine_config(model_path, attention_backend="express", enable_prefix_caching=asked)
    assert config.cache_config.enable_prefix_caching is (asked is not False)


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
        ({"kv_cache_dtype": "fp8"}, ["a KV cache of another type", "--kv-cache-dtype"]),
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


class Changed:
    """An object with one attribute of another value."""

    def __init__(self, original, name, value):
        self._original = original
        setattr(self, name, value)

    def __getattr__(self, name):
        return getattr(self._original, name)


@pytest.fixture(scope="module")
def plain_config(model_path):
    return engine_config(model_path, attention_backend="express")


def text(layer_types, **more):
    """A Hugging Face text configuration."""
    return SimpleNamespace(layer_types=layer_types, **more)


def changed(config, path, value):
    """`config` with `value` at the dotted `path`; vLLM's renaming of an attribute fails here."""
    name, _, rest = path.partition(".")
    assert hasattr(config, name), f"vLLM has no {path} any more"
    return Changed(config, name, changed(getattr(config, name), rest, value) if rest else value)


@pytest.mark.parametrize(
    ("path", "value", "feature"),
    [
        ("cache_config.cache_dtype", "float16", "a KV cache of another type than the model's"),
        ("cache_config.cache_dtype", "fp8", "a KV cache of another type than the model's"),
        ("ec_transfer_config", object(), "KV connectors, encoder-cache transfer"),
        ("cache_config.kv_offloading_size", 4.0, "KV offloading"),
        ("cache_config.kv_sharing_fast_prefill", True, "KV-sharing fast prefill"),
        ("parallel_config.decode_context_parallel_size", 2, "decode context parallelism"),
        ("parallel_config.prefill_context_parallel_size", 2, "prefill context parallelism"),
        ("parallel_config.use_ubatching", True, "dual-batch overlap"),
        ("parallel_config.worker_cls", "vllm.v1.worker.cpu_worker.CPUWorker",
         "a worker, scheduler or executor class of your own"),
        ("scheduler_config.scheduler_cls", "vllm.v1.core.sched.scheduler.Scheduler",
         "a worker, scheduler or executor class of your own"),
        ("parallel_config.distributed_executor_backend", "my.Executor",
         "a worker, scheduler or executor class of your own"),
        ("parallel_config.enable_elastic_ep", True,
         "sleep mode, elastic expert parallelism, fault tolerance"),
        ("parallel_config.enable_fault_tolerance", True,
         "sleep mode, elastic expert parallelism, fault tolerance"),
        ("model_config.enable_sleep_mode", True,
         "sleep mode, elastic expert parallelism, fault tolerance"),
        ("attention_config.backend_per_kind", {"full_attention": None},
         "attention backends by kind of layer"),
        ("aux_output_config.enable_return_routed_experts", True, "routed experts in answers"),
        ("model_config.max_model_len", MAX_TOKENS + 1, "sequences of more than 16,777,216 tokens"),
        ("model_config.use_mla", True, "MLA models"),
        ("model_config.is_encoder_decoder", True, "encoder-decoder models"),
        ("model_config.is_attention_free", True, "attention-free models"),
        ("model_config.hf_text_config", text(["indexed_attention"]),
         "layers of a kind that express does not know"),
        ("model_config.hf_text_config", text(["sliding_attention"], sliding_window=64),
         "models without a layer that grows"),
        ("model_config.hf_text_config", text(["full_attention"], num_kv_shared_layers=2),
         "KV sharing between layers"),
        ("model_config.is_diffusion", True, "diffusion models"),
        ("diffusion_config", object(), "diffusion models"),
        ("model_config.runner_type", "pooling", "pooling models"),
        ("use_v2_model_runner", True, "Model Runner V2 on CPUs, V1 on GPUs"),
        ("kv_events_config", SimpleNamespace(enable_kv_cache_events=True), "KV events"),
    ],
)  # fmt: skip
def test_each_conflict_is_seen(plain_config, path, value, feature):
    assert conflicts.find_conflicts(plain_config) == []
    (found,) = conflicts.find_conflicts(changed(plain_config, path, value))
    assert found.feature == feature


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"enable_dbo": True}, ["dual-batch overlap", "--enable-dbo"]),  # CPUs would just drop it
        ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, ["--worker-cls"]),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, ["--scheduler-cls"]),
        ({"attention_config": {"backend_per_kind": {"full_attention": "EXPRESS"}}},
         ["backend_per_kind"]),
        ({"dtype": "float32", "kv_cache_dtype": "bfloat16"}, ["--kv-cache-dtype"]),
    ],
)  # fmt: skip
def test_what_would_start_and_go_wrong_is_refused(model_path, arguments, words):
    if "attention_config" not in arguments:
        arguments = {"attention_backend": "express", **arguments}
    with pytest.raises(Exception, match="cannot run with") as error:
        engine_config(model_path, **arguments)
    for word in words:
        assert word in str(error.value)


def test_a_worker_that_is_ours_passes(plain_config, monkeypatch):
    from express_vllm.backend.cpu.worker import ExpressCPUWorker

    module = ModuleType("own_worker")
    module.Counting = type("Counting", (ExpressCPUWorker,), {})
    monkeypatch.setitem(sys.modules, "own_worker", module)
    path = "parallel_config.worker_cls"
    for name in ("express_vllm.backend.cpu.worker.ExpressCPUWorker", "own_worker.Counting"):
        assert conflicts.find_conflicts(changed(plain_config, path, name)) == []


def test_a_checkpoint_with_a_quantized_cache_is_told_the_flag(model_path, tmp_path):
    """`auto` follows its `kv_cache_scheme`; the model's own type overrides it."""
    for file in model_path.glob("*.json"):
        shutil.copy(file, tmp_path)
    eight = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    config = json.loads((model_path / "config.json").read_text()) | {
        "quantization_config": {
            "quant_method": "compressed-tensors", "format": "float-quantized",
            "kv_cache_scheme": {**eight, "strategy": "tensor"}, "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": {**eight, "strategy": "channel"},
                            "input_activations": {**eight, "strategy": "token", "dynamic": True}},
            },
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="--kv-cache-dtype bfloat16"):
        engine_config(tmp_path, attention_backend="express")
    engine_config(tmp_path, attention_backend="express", kv_cache_dtype="bfloat16")


@pytest.mark.parametrize(("newer", "refused"), [("0", True), ("1", False)])
def test_rays_older_executor_is_refused(plain_config, monkeypatch, newer, refused):
    """It calls the model runner itself: no step would know its budgets."""
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", newer)
    ray = changed(plain_config, "parallel_config.distributed_executor_backend", "ray")
    assert [c.feature for c in conflicts.find_conflicts(ray)] == ["Ray's older executor"] * refused


def test_batch_invariance_is_refused(plain_config, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert [c.feature for c in conflicts.find_conflicts(plain_config)] == ["batch invariance"]


def selected(**changes):
    import torch
    from vllm.v1.attention.selector import AttentionSelectorConfig

    return AttentionSelectorConfig(
        **{"head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": None}
        | changes
    )


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("has_sliding_window", True, "sliding-window"),
        ("use_rswa", True, "sliding-window"),
        ("use_mla", True, "MLA"),
        ("use_sparse", True, "sparse"),
        ("use_mm_prefix", True, "multimodal"),
        ("use_non_causal", True, "not causal"),
        ("attn_type", "encoder", "encoder"),
        ("kv_cache_dtype", "float16", "another type"),
        ("use_adaptive_verification", True, "use_adaptive_verification=True: not built"),
    ],
)
def test_layers_are_refused(field, value, word):
    from express_vllm.backend.attention import ExpressBackend

    for plain in ({}, {"kv_cache_dtype": "bfloat16"}, {"block_size": 32}, {"head_size": 33},
                  {"has_sink": True}):  # fmt: skip
        ExpressBackend.check_layer(selected(**plain))
    with pytest.raises(conflicts.ConflictError, match=word):
        ExpressBackend.check_layer(selected(**{field: value}))


def test_a_layers_soft_cap_and_sinks_reach_its_path(plain_config, monkeypatch):
    """The sinks are the model's own parameter, whose weights are loaded after the layer is made."""
    import torch
    from vllm.config import set_current_vllm_config

    from express_vllm.backend import attention

    monkeypatch.setattr(attention, "first_kv_head", lambda heads: 0)
    sinks = torch.nn.Parameter(torch.zeros(4))
    plain = (4, 64, 0.125, 2, None, None, "auto")
    with set_current_vllm_config(plain_config):
        layer = attention.ExpressImpl(*plain, 50.0, "decoder", None, sinks=sinks)
        none = attention.ExpressImpl(*plain, None, "decoder", None)
        with pytest.raises(conflicts.ConflictError, match="new="):
            attention.ExpressImpl(*plain, None, "decoder", None, new=1)
    softmax = layer._device.path(0).softmax
    assert softmax.sinks is sinks and softmax[:2] == (0.125, 50.0)
    assert none._device.path(0).softmax == (0.125, 0.0, None, None)


def test_an_argument_of_a_layer_that_vllm_adds_is_refused(monkeypatch):
    from vllm.v1.attention import selector

    from express_vllm.backend.attention import ExpressBackend

    class Newer(selector.AttentionSelectorConfig):
        _field_defaults: ClassVar = {
            **selector.AttentionSelectorConfig._field_defaults,
            "new": False,
        }
        new = True

        def _asdict(self):
            return {**super()._asdict(), "new": self.new}

    with pytest.raises(conflicts.ConflictError, match="new=True: not built"):
        ExpressBackend.check_layer(Newer(*selected()))


@pytest.mark.parametrize(("size", "works"), [(8, 1), (120, 1), (256, 1), (100, 0), (264, 0)])
def test_head_sizes_of_the_triton_kernels(monkeypatch, size, works):
    from express_vllm.backend.attention import ExpressBackend

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if works:
        ExpressBackend.check_layer(selected(head_size=size))
        return
    with pytest.raises(conflicts.ConflictError, match="multiple of 8"):
        ExpressBackend.check_layer(selected(head_size=size))


def a_spec(name="FullAttentionSpec", **changes):
    import torch
    from vllm.v1 import kv_cache_interface

    plain = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    return getattr(kv_cache_interface, name)(**plain | changes)


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({"name": "ChunkedLocalAttentionSpec", "attention_chunk_size": 8192}, "chunked-local"),
        ({"name": "SlidingWindowSpec", "sliding_window": 64}, "sliding-window"),
        ({"name": "SinkFullAttentionSpec", "sink_len": 4}, "attention sinks"),
        ({"name": "CrossAttentionSpec"}, "cross and encoder"),
        ({"name": "EncoderOnlyAttentionSpec"}, "cross and encoder"),
        ({"name": "MLAAttentionSpec"}, "MLA"),
        ({"name": "AttentionSpec"}, "class AttentionSpec: not built"),
        ({"sliding_window": 64}, "sliding-window"),
        ({"attention_chunk_size": 8192}, "chunked-local"),
        ({"non_causal": True}, "prefix-LM"),
        ({"head_size_v": 32}, "values of another size"),
        ({"kv_quant_mode": 1}, "another type"),
        ({"tokens_per_state": 4}, "tokens_per_state=4: not built"),
    ],
)
def test_specs_are_refused(spec, word):
    from express_vllm.backend.attention import ExpressBackend

    plain = ExpressBackend.customize_spec(a_spec())
    assert ExpressBackend.customize_spec(plain) is plain
    with pytest.raises(conflicts.ConflictError, match=word):
        ExpressBackend.customize_spec(a_spec(**spec))


def test_layers_of_another_backend_are_refused():
    """Some models name the backend of a layer themselves, past --attention-backend."""
    from express_vllm.layers import Bounded, ModelLayers
    from express_vllm.scheduler.spec import ExpressSpec, check_layers

    ours, window = ExpressSpec.of(a_spec()), a_spec(name="SlidingWindowSpec", sliding_window=64)
    mixed = ModelLayers((1, 3), (Bounded(2, 64),))
    check_layers({0: window, 1: ours}, mixed)  # a pipeline stage
    check_layers({2: window, 3: ours}, mixed)
    for built in ({0: ours}, {1: window}, {1: a_spec()}, {0: a_spec()}):
        with pytest.raises(conflicts.ConflictError, match="another backend"):
            check_layers(built, mixed)


def test_a_layer_under_another_scheduler_is_refused(plain_config):
    conflicts.refuse_unprepared(plain_config)
    other = changed(plain_config, "scheduler_config.scheduler_cls", None)
    with pytest.raises(conflicts.ConflictError, match="for the whole server"):
        conflicts.refuse_unprepared(other)


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
        ("vllm.v1.worker.cpu_worker:CPUWorker", "determine_available_memory", []),
        ("vllm.v1.worker.cpu_worker:CPUWorker", "initialize_from_config", ["kv_cache_config"]),
        ("vllm.v1.worker.cpu_worker:CPUWorker", "compile_or_warm_up_model", []),
        ("vllm.v1.worker.cpu_worker:CPUWorker", "execute_dummy_batch", []),
        ("vllm.v1.worker.cpu_worker:CPUWorker", "sample_tokens", ["grammar_output"]),
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


def test_a_reader_that_leaves_ends_the_command_quietly():
    """`express-vllm ... | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", "from express_vllm.cli import main; main()", "conflicts"],
        stdout=writing, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(writing)
    assert done.returncode == -signal.SIGPIPE and done.stderr == ""


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
