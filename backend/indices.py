"""Where a rank's layers and KV heads lie in the whole model: these indices feed the seed."""

from __future__ import annotations

from vllm.config import get_current_vllm_config


def layer_index(name: str) -> int:
    """The global index of the decoder layer `name`: the same on every pipeline rank."""
    # Imported here: it loads the models' code, which processes without a model do not need.
    from vllm.model_executor.models.utils import extract_layer_index

    return extract_layer_index(name)


def first_kv_head(local_heads: int) -> int:
    """Global index of this tensor-parallel rank's first KV head."""
    # Imported here: a rank is known, and vLLM's communication loaded, only in a worker.
    from vllm.distributed import get_tensor_model_parallel_rank

    config = get_current_vllm_config()
    total = config.model_config.get_total_num_kv_heads()
    rank, size = get_tensor_model_parallel_rank(), config.parallel_config.tensor_parallel_size
    return rank * total // size if total < size else rank * local_heads
