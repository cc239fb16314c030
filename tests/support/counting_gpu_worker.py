"""Workers on GPUs that count what they say to each other: express's and vLLM's own."""

from counting import CountingMixin, count
from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator
from vllm.v1.worker.gpu_worker import Worker

from express_vllm.backend.gpu.worker import ExpressGPUWorker

TALK = ("all_gather", "all_gatherv", "all_reduce", "broadcast", "gather", "recv", "reduce_scatter",
        "reduce_scatterv", "send")  # fmt: skip
count(CudaCommunicator, TALK)


class ExpressWorker(CountingMixin, ExpressGPUWorker):
    pass


class OwnWorker(CountingMixin, Worker):
    pass
