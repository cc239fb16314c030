"""What patches and work-arounds rely on, held against the installed vLLM."""

from __future__ import annotations

import inspect

import pytest
import torch


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
