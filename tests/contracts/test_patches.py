"""What `express_vllm.patches` and the edge rely on in vLLM, by its source: loud when it changes."""

from __future__ import annotations

import inspect

import pytest
import torch
from vllm import outputs
from vllm.v1.core.sched import scheduler
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    async_llm,
    llm_engine,
    output_processor,
)
from vllm.v1.engine import core as engine_core
from vllm.v1.engine.input_processor import InputProcessor

from express_vllm.patches import (
    PATCHED,
    count_cached_tokens_by_sequence,
    name_requests_of_state_models,
    resolve_at_the_edge,
)


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


def test_every_sequence_is_told_what_was_cached_before_its_first_output():
    count_cached_tokens_by_sequence()
    patched = output_processor.RequestState._new_completion_output
    assert hasattr(patched, PATCHED) and not hasattr(patched.__wrapped__, PATCHED)
    source = inspect.getsource(output_processor.OutputProcessor.process_outputs)
    told = source.index("req_state.num_cached_tokens = (")
    assert told < source.index("req_state.make_request_output(")
    made = inspect.getsource(output_processor.RequestState.make_request_output)
    assert "output = self._new_completion_output(" in made
    # When this fails, vLLM tells the sequences apart, and the patch can go.
    assert "cached" not in inspect.getsource(outputs.CompletionOutput)


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


def test_the_scheduler_asks_where_requests_start_and_end():
    """express_vllm.scheduler.scheduler: what a request starts from, whether it waits, how many
    tokens a step computes, and what is done when its blocks are freed."""
    source = inspect.getsource(scheduler.Scheduler.schedule)
    find = source.index("= self._get_local_prefix_cache_hit(request)")
    wait = source.index("if self._ec_transfer_pending(request, num_computed_tokens):")
    assert find < wait < source.index("prefill_stats.set(")
    assert source.count("num_new_tokens = self._reserve_prefill_lookahead(") == 2
    assert "skip_request(request_queue)\n                        continue" in source[wait:]
    for end in (scheduler.Scheduler._preempt_request, scheduler.Scheduler._free_blocks):
        assert "self._free_request_blocks(request)" in inspect.getsource(end)
    preempt = inspect.getsource(scheduler.Scheduler._preempt_request)
    freed = preempt.index("self._free_request_blocks(request)")
    assert freed < preempt.index("request.num_computed_tokens = 0")


def test_blocks_are_copied_before_a_step_computes_and_held_until_then():
    """express_vllm.scheduler.manager"""
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.worker.gpu import model_runner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    taken = inspect.getsource(KVCacheManager.take_kv_cache_block_copies)
    assert "mgr.take_pending_cow_copies()" in taken
    assert "retained_blocks = [block for pair in pending_copies for block in pair]" in taken
    for runner in (GPUModelRunner._update_states, model_runner.GPUModelRunner.update_requests):
        assert "copy_kv_cache_blocks_inplace(" in inspect.getsource(runner)
    execute = inspect.getsource(model_runner.GPUModelRunner.execute_model)
    assert execute.index("self.update_requests(scheduler_output)") < execute.index(
        "if scheduler_output.total_num_scheduled_tokens == 0:"
    )


def test_a_block_with_a_hash_is_freed_to_the_end_and_loses_it_to_the_next():
    """express_vllm.scheduler.states: what keeps the blocks of a state, and says that it is gone."""
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

    pool = BlockPool(8, enable_caching=True, hash_block_size=16)
    tagged, plain = pool.get_new_blocks(1), pool.get_new_blocks(1)
    tag = make_block_hash_with_group_id(BlockHash(b"tag"), 0)
    tagged[0].set_block_hash(tag)
    pool.free_blocks(tagged)
    pool.free_blocks(plain)
    assert pool.get_new_blocks(6)[0] is plain[0]
    assert tagged[0].block_hash is tag
    assert pool.get_new_blocks(1) == tagged
    assert tagged[0].block_hash is None


def test_vllm_still_turns_generators_back_that_cannot_on_cpus():
    """When this fails, backend.cpu.worker.unfinished_prompts_unseeded can go."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner._bookkeeping_sync)
    assert "self.input_batch.generators.get(int(i))" in source
    assert "gen.set_offset(gen.get_offset() - 4)" in source
    with pytest.raises(RuntimeError, match="offset"):
        torch.Generator().get_offset()


def test_models_with_states_do_not_name_their_requests_themselves():
    """Model Runner V2 names them for other models, by the argument that the patch adds."""
    from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
    from vllm.v1.worker.gpu.model_states import default, mamba_hybrid

    name_requests_of_state_models()
    patched = mamba_hybrid.MambaHybridModelState.prepare_attn
    source = inspect.getsource(patched.__wrapped__)
    assert "= build_attn_metadata(" in source and "req_idx=" not in source
    assert mamba_hybrid.build_attn_metadata is build_attn_metadata
    assert "req_idx" in inspect.signature(build_attn_metadata).parameters
    others = inspect.getsource(default.DefaultModelState.prepare_attn)
    assert "req_idx=input_batch.idx_mapping_np" in others
