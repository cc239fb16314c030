"""Seconds that this process's current step has spent compacting, for the metrics.

Whoever compacts calls `add`; the worker puts the step's sum on the model's output (`stamp`), on
which it travels to the scheduler, also between processes.  With several tensor-parallel ranks vLLM
returns one rank's output, and the seconds are that rank's.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from express_vllm.scheduler.stats import COMPACTION_SECONDS

_seconds = 0.0


def add(seconds: float) -> None:
    global _seconds
    _seconds += seconds


def take() -> float:
    """The sum since the last call."""
    global _seconds
    seconds, _seconds = _seconds, 0.0
    return seconds


def stamp(output: Any) -> Any:
    """Put the step's seconds on its output, which may still be on its way from a GPU; anything else
    passes through."""
    inner = getattr(output, "model_runner_output", output)
    if isinstance(inner, ModelRunnerOutput) and inner is not EMPTY_MODEL_RUNNER_OUTPUT:
        seconds = take()
        if seconds:
            setattr(inner, COMPACTION_SECONDS, seconds)
    return output
