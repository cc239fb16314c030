"""The worker on CPUs: Model Runner V1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from ..worker import BudgetsMixin


class ExpressCPUWorker(BudgetsMixin, CPUWorker):
    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        if self.use_v2_model_runner:  # in Triton's interpreter; it keeps no generators
            return super().sample_tokens(*args, **kwargs)
        with unfinished_prompts_unseeded(self.model_runner):
            return super().sample_tokens(*args, **kwargs)


@contextmanager
def unfinished_prompts_unseeded(runner: Any) -> Iterator[None]:
    """Hide the random generators of requests whose prompt goes on in the next step.

    vLLM 0.32 samples for them too, drops the token and turns their generator back by an offset,
    which generators on CPUs do not have: a request with a seed and a prompt of several chunks ends
    the engine.  Without a generator nothing is drawn from it, so that there is nothing to turn
    back, and a seed gives the same tokens whatever the chunks.
    """
    generators = runner.input_batch.generators
    dropped = runner.discard_request_mask.np[: runner.input_batch.num_reqs]
    hidden = {row: generators.pop(row) for row in list(generators) if dropped[row]}
    try:
        yield
    finally:
        generators.update(hidden)
