"""Tensor and data parallelism on two GPUs: `pytest -m gpu2`."""

import pytest
import torch
from test_tensor_parallel import (  # noqa: F401
    assert_only_the_models,
    calls,
    llama,
    one,
    run_ranks,
    test_a_state_is_copied_on_every_rank,
    test_two_engines_share_a_load,
    test_two_pipeline_stages_give_the_tokens_of_one,
    test_two_ranks_give_the_tokens_of_one,
    test_two_ranks_leak_no_block,
    two,
)

pytestmark = [
    pytest.mark.gpu2,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2,
        reason=f"needs two CUDA GPUs, this machine has {torch.cuda.device_count()}",
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [128, 512])
def test_two_gpus_decide_as_one(dtype, slots):
    """The kernels on half of the heads each: the same pages as of all heads, bit for bit."""
    from rank_cases import compare

    compare([torch.device("cuda", i) for i in range(2)], dtype, 8, slots=slots)


def test_express_adds_no_communication(tmp_path, llama, calls):  # noqa: F811
    """Calls and bytes of every step are those of FLASH_ATTN: what the model needs."""
    talk = {
        backend: run_ranks(
            tmp_path, backend, calls["talk"], llama, tensor_parallel_size=2, dtype="bfloat16",
            enforce_eager=True, worker_cls=f"counting_gpu_worker.{worker}",
        )["talk"]
        for backend, worker in (("express", "ExpressWorker"), ("FLASH_ATTN", "OwnWorker"))
    }  # fmt: skip
    assert talk["express"] == talk["FLASH_ATTN"]
    assert_only_the_models(talk["express"][0]["all_reduce"], element=2)
