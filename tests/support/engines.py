"""Real engines for tests: configured, or run in a process of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from express_vllm import smallmodel

SUPPORT = Path(__file__).parent
BLOCK = 32
POOL = 48  # blocks: two budgets of 512 fit, nine requests that grow from 4 to 6 blocks do not
#: vLLM's own backend that computes in float32.
OWN = "TRITON_ATTN" if torch.cuda.is_available() else "CPU_ATTN"
#: A GPU runs compiled, with CUDA graphs, and leaves room for other tests' engines.
RUNS = (
    {"gpu_memory_utilization": 0.12, "max_num_seqs": 32}
    if torch.cuda.is_available()
    else {"enforce_eager": True}
)


def run_engine(
    tmp_path, backend, calls, *, environment=None, interpret=False, timeout=900, **engine
):
    """Run `calls` on a fresh engine in a subprocess; -> their results."""
    output = tmp_path / f"{backend}.json"
    output.unlink(missing_ok=True)  # an earlier run's, which would hide that this one fails
    job = {
        "engine": {
            "model": str(smallmodel.ensure()),
            "attention_backend": backend,
            "dtype": "float32",
            "block_size": BLOCK,
            "num_gpu_blocks_override": POOL,
            "additional_config": {"express": {"max_memory_tokens": 1024, "memory_tokens": 512}},
            "kv_cache_memory_bytes": 1 << 30,
            "enable_prefix_caching": False,
            "max_num_batched_tokens": 2048,
            "max_model_len": 8192,
            **RUNS,
            **engine,
        },
        "calls": calls,
        "interpret": interpret,
        "output": str(output),
    }
    log = tmp_path / f"{backend}.log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, str(SUPPORT / "engine_runner.py")],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            text=True,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        try:
            process.communicate(json.dumps(job), timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the engine's workers outlive the runner
    text = log.read_text()
    assert output.exists(), text[-8000:]
    print(*[line for line in text.splitlines() if line.startswith("[job]")], sep="\n")
    return json.loads(output.read_text())


def request(prompt, max_tokens, **fields):
    extra = {f"express_{name}": value for name, value in fields.items()}
    return {"prompt": prompt, "max_tokens": max_tokens, "extra_args": extra or None, "margin": True}


def same_tokens(first, second):
    return sum(a == b for a, b in zip(first["tokens"], second["tokens"], strict=True))


def engine_config(model_path, **arguments):
    """The VllmConfig that `vllm serve` would make, without starting an engine."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"max_model_len": 2048, **arguments}
    return EngineArgs(model=str(model_path), **arguments).create_engine_config()
