"""An express worker whose ranks talk over gloo instead of vLLM's shared-memory collectives.

Those spin, so three ranks on two cores would wait for each other's time slices.
"""

from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

from express_vllm.backend.cpu.worker import ExpressCPUWorker

CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False


class GlooWorker(ExpressCPUWorker):
    pass
