"""Tensor and data parallelism on two GPUs: `pytest -m gpu2`."""

import pytest
import torch
from test_tensor_parallel import (  # noqa: F401
    calls,
    llama,
    one,
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
