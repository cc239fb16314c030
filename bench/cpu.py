"""Prefill and decode on the CPU: express against vLLM's own CPU_ATTN, with the small model.

    python -m bench.cpu [--rounds 2] [--compile] [--dtype bfloat16]

Each round starts one engine for each backend, in turn, so that both see the same machine.  Decode
times are means over 160 tokens, compactions included; of the rounds the median is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .record import save, table

TOKENS = 160
#: (what, context, extra_args); the first of each context is what express is compared on.
CASES: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("512", 512, {"express_memory_tokens": 1024}),
    ("7500, 1,024 tokens", 7500, {"express_memory_tokens": 1024}),
    ("7500, 512 tokens", 7500, {"express_memory_tokens": 512}),
    ("7500, 2,048 tokens", 7500, {"express_memory_tokens": 2048}),
    ("7500, exact", 7500, {"express_mode": "exact"}),
)


def measure(backend: str, compiled: bool, dtype: str) -> dict[str, dict[str, float]]:
    """Run every case on a new engine; -> case -> {prefill seconds, decode milliseconds}."""
    from vllm import LLM, SamplingParams

    from express_vllm import smallmodel

    llm = LLM(
        str(smallmodel.ensure()), attention_backend=backend, dtype=dtype,
        enforce_eager=not compiled, enable_prefix_caching=False, kv_cache_memory_bytes=1 << 30,
        max_num_batched_tokens=2048, disable_log_stats=True,
    )  # fmt: skip
    tokenizer = llm.get_tokenizer()
    tokens = tokenizer(_text())["input_ids"][:7500]
    results = {}
    cases = CASES if backend == "express" else (CASES[0], CASES[1])
    for number, (name, context, extra) in enumerate(cases):
        arguments = extra if backend == "express" else None
        params = SamplingParams(
            temperature=0, max_tokens=TOKENS + 1, ignore_eos=True, extra_args=arguments
        )
        if number == 0:
            _run(llm, "warm-up", tokens[:256], params)
        times = _run(llm, name, tokens[:context], params)
        results[name] = {
            "prefill_s": times[0],
            "decode_ms": 1e3 * (times[-1] - times[0]) / (len(times) - 1),
        }
        print(f"[{backend}] {name}: {results[name]}", flush=True)
    return results


def _run(llm: Any, name: str, tokens: list[int], params: Any) -> list[float]:
    """Seconds from the request to each of its tokens."""
    engine = llm.llm_engine
    start = time.perf_counter()
    engine.add_request(name, {"prompt_token_ids": tokens}, params)
    times: list[float] = []
    while engine.has_unfinished_requests():
        outputs = engine.step()
        if outputs and len(outputs[0].outputs[0].token_ids) > len(times):
            times.append(time.perf_counter() - start)
    return times


def _text() -> str:
    import pydoc_data.topics

    return pydoc_data.topics.topics["compound"] + pydoc_data.topics.topics["types"]


def _in_process(backend: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [sys.executable, "-m", "bench.cpu", "--only", backend, "--output", str(output)]
        command += ["--dtype", options.dtype] + (["--compile"] if options.compile else [])
        environment = {**os.environ, "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, env=environment, check=True)
        return json.loads(output.read_text())


def rows(rounds: list[dict[str, dict[str, dict[str, float]]]]) -> list[dict[str, Any]]:
    """One row a case: express, CPU_ATTN at the same context, and their ratio."""
    result = []
    for name, context, _ in CASES:
        theirs_name = CASES[0][0] if context == 512 else CASES[1][0]
        row: dict[str, Any] = {"context": name}
        for key, label in (("prefill_s", "prefill, s"), ("decode_ms", "decode, ms/token")):
            ours = statistics.median(r["express"][name][key] for r in rounds)
            theirs = statistics.median(r["CPU_ATTN"][theirs_name][key] for r in rounds)
            row[f"{label}: express"] = round(ours, 2)
            row[f"{label}: CPU_ATTN"] = round(theirs, 2)
            row[f"{label}: ratio"] = round(ours / theirs, 2)
        result.append(row)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="torch.compile, as vllm serve does")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--name", default="cpu", help="of the file in bench/results/speed/")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        result = measure(options.only, options.compile, options.dtype)
        Path(options.output).write_text(json.dumps(result))
        sys.stdout.flush()
        return
    rounds = []
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", flush=True)
        rounds.append({name: _in_process(name, options) for name in ("CPU_ATTN", "express")})
    result = rows(rounds)
    print(table(result))
    path = save(f"speed/{options.name}", result, model="SmolLM2-135M-Instruct", dtype=options.dtype,
                compiled=options.compile, rounds=rounds)  # fmt: skip
    print(path)


if __name__ == "__main__":
    main()
