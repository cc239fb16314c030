"""What `express_vllm.patches` and the edge rely on in vLLM, by its source: loud when it changes."""

from __future__ import annotations

import inspect

import pytest
import torch
from vllm.v1.core.sched import scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, async_llm, llm_engine
from vllm.v1.engine import core as engine_core
from vllm.v1.engine.input_processor import InputProcessor

from express_vllm.patches import PATCHED, resolve_at_the_edge


def test_every_request_passes_the_input_processor():
    """Both engines make requests with it; it settles lengths before it returns."""
    resolve_at_the_edge()
    resolve_at_the_edge()
    patched = InputProcessor.process_inputs
    assert hasattr(patched, PATCHED) and not hasattr(patched.__wrapped__, PATCHED)
    for module in (async_llm, llm_engine):
        assert "input_processor.process_inputs(" in inspect.getsource(module)
    source = inspect.getsource(patched.__wrapped__)
    clone, length = source.index("params.clone()"), source.index("sampling_params.max_tokens = (")
    assert clone < length < source.index("return EngineCoreRequest(")
    assert "resumable=resumable" in source
    # The clone's parameters are what sequences of n > 1 are made from.
    assert "params = request.params" in inspect.getsource(async_llm.AsyncLLM.add_request)


def test_a_raised_exception_would_still_end_the_engine():
    """Why `add_request` must not raise: the loop that calls it guards nothing."""
    source = inspect.getsource(engine_core.EngineCoreProc._handle_client_request)
    assert "self.add_request(req, request_wave)" in source and "except" not in source


def test_a_refused_request_is_told_to_its_client():
    source = inspect.getsource(scheduler.Scheduler)
    assert "self.finished_req_ids: set[str] = set()" in source
    assert "self.finished_req_ids_dict[request.client_index].add(request_id)" in source
    assert "if self.finished_req_ids:" in inspect.getsource(
        scheduler.Scheduler.has_finished_requests
    )
    assert {"outputs", "finished_requests"} <= set(EngineCoreOutputs.__struct_fields__)
    assert EngineCoreOutput.__struct_fields__[:2] == ("request_id", "new_token_ids")


def test_vllm_fills_in_prefix_caching_where_we_look():
    """express_vllm.patches.keep_prefix_caching_asked"""
    from vllm.engine.arg_utils import EngineArgs

    assert EngineArgs.__dataclass_fields__["enable_prefix_caching"].default is None
    original = EngineArgs._set_default_chunked_prefill_and_prefix_caching_args
    source = inspect.getsource(inspect.unwrap(original))
    assert list(inspect.signature(original).parameters) == ["self", "model_config"]
    assert "if self.enable_prefix_caching is None:" in source


def test_vllm_still_turns_generators_back_that_cannot_on_cpus():
    """When this fails, backend.cpu.worker.unfinished_prompts_unseeded can go."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner._bookkeeping_sync)
    assert "self.input_batch.generators.get(int(i))" in source
    assert "gen.set_offset(gen.get_offset() - 4)" in source
    with pytest.raises(RuntimeError, match="offset"):
        torch.Generator().get_offset()
