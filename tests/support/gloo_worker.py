"""An express worker whose ranks talk over gloo instead of vLLM's shared-memory collectives.

Those spin, so three ranks on two cores would wait for each other's time slices.
"""

import torch.distributed
from counting import CountingMixin, count
from vllm.distributed import get_pp_group
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

from express_vllm.backend.cpu.worker import ExpressCPUWorker

CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False

#: What ranks say to each other.
TALK = (
    "all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all", "all_to_all_single",
    "barrier", "broadcast", "gather", "irecv", "isend", "recv", "reduce", "reduce_scatter",
    "reduce_scatter_tensor", "scatter", "send", "all_gather_object", "broadcast_object_list",
)  # fmt: skip
count(torch.distributed, TALK)


class GlooWorker(CountingMixin, ExpressCPUWorker):
    def load_model(self, *args, **kwargs):
        """vLLM makes the tensors that a later pipeline stage receives in its warm-up, which it
        leaves out on a CPU in eager mode."""
        super().load_model(*args, **kwargs)
        if not get_pp_group().is_first_rank:
            runner = self.model_runner
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                runner.max_num_tokens, runner.model_config.dtype, runner.device
            )
