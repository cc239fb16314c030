"""Prefix caching end to end, express beside vLLM's own backend: `python -m bench.reuse`.

- `turn`: first token of a second turn, `--shared` tokens of history and `--new` ones;
- `chat`: sum of the first-token times of 8 turns, each of 1,000 new tokens and 500 of answer;
- `document`: `--readers` requests that come at once, about one document of `--document` tokens and
  a question of 100, with answers of 500 tokens: tokens per second, and the most KV memory held;
- `cold`: first token of a prompt of `--shared` tokens that nothing is cached of.

Random tokens through a Llama-3.1-8B with random weights, whose speed is that of the real one; or
`--model smollm2`, on a CPU too.  "express, off" runs with --no-enable-prefix-caching: with it cold
prompts are compared.  Each runs in a process of its own, one after the other on the same device.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import engine
from bench.engine import SHAPES

RUNS = ("own", "express", "express, off")
TURNS, TURN_NEW, ANSWER, QUESTION = 8, 1000, 500, 100


def tokens(count: int, seed: int) -> list[int]:
    """That every model here has."""
    return engine.tokens(count, seed, most=40000)


class Engine(engine.Driver):
    """A vLLM engine in this process, driven step by step, whose block pool can be read."""

    def __init__(self, run: str, model: str, options: argparse.Namespace) -> None:
        import torch
        from vllm import LLM

        on_gpu = torch.cuda.is_available()
        own = "FLASH_ATTN" if on_gpu else "CPU_ATTN"
        arguments: dict[str, Any] = {}
        if run != "own":
            arguments["additional_config"] = {"express": {"memory_tokens": options.memory}}
        if on_gpu:
            arguments["gpu_memory_utilization"] = 0.92
        else:
            arguments |= {"kv_cache_memory_bytes": 2 << 30, "enforce_eager": True}
        if options.model in SHAPES:
            arguments["load_format"] = "dummy"
        llm = LLM(
            model, attention_backend=own if run == "own" else "express", dtype=options.dtype,
            skip_tokenizer_init=True, max_model_len=options.max_model_len, disable_log_stats=True,
            enable_prefix_caching=run != "express, off", max_num_seqs=max(options.readers, 8),
            max_num_batched_tokens=options.batched_tokens, **arguments,
        )  # fmt: skip
        super().__init__(llm)
        self.manager = self.engine.engine_core.engine_core.scheduler.kv_cache_manager
        self.most_used = 0.0

    def ask(self, prompt: list[int], max_tokens: int) -> tuple[float, list[int]]:
        """One request -> seconds to its first token, its answer."""
        start, first, answer = time.perf_counter(), 0.0, []
        self.add(prompt, max_tokens)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                first = first or time.perf_counter() - start
                answer = list(output.outputs[0].token_ids)
        return first, answer

    def all(self) -> None:
        """Run what was added."""
        while self.engine.has_unfinished_requests():
            self.engine.step()
            self.most_used = max(self.most_used, self.manager.usage)

    def pool_bytes(self) -> int:
        config = self.manager.kv_cache_config
        return sum(tensor.size for tensor in config.kv_cache_tensors)


def turn(driver: Engine, options: argparse.Namespace) -> dict[str, Any]:
    """Of histories that end in an answer; the first is a warm-up."""
    firsts, seconds = [], []
    for i in range(options.repeats + 1):
        prompt = tokens(options.shared - ANSWER // 5, 100 + i)
        first, answer = driver.ask(prompt, ANSWER // 5)
        history = prompt + answer
        second, _ = driver.ask(history + tokens(options.new, 200 + i), 2)
        firsts, seconds = [*firsts, first], [*seconds, second]
    return {
        "turn: first turn, s": round(statistics.median(firsts[1:]), 4),
        "turn: second turn, s": round(statistics.median(seconds[1:]), 4),
    }


def chat(driver: Engine, options: argparse.Namespace) -> dict[str, Any]:
    history: list[int] = []
    times = []
    for i in range(TURNS):
        history = history + tokens(TURN_NEW, 300 + i)
        first, answer = driver.ask(history, ANSWER)
        times.append(first)
        history = history + answer
    return {"chat: first tokens, sum, s": round(sum(times), 4)}


def document(driver: Engine, options: argparse.Namespace) -> dict[str, Any]:
    text = tokens(options.document, 400)
    driver.most_used = 0.0
    start = time.perf_counter()
    for i in range(options.readers):
        driver.add(text + tokens(QUESTION, 500 + i), ANSWER)
    driver.all()
    seconds = time.perf_counter() - start
    return {
        "document: tokens/s": round(options.readers * ANSWER / seconds, 1),
        "document: s": round(seconds, 2),
        "document: KV held, MB": round(driver.most_used * driver.pool_bytes() / 1e6),
    }


def cold(driver: Engine, options: argparse.Namespace) -> dict[str, Any]:
    times = [driver.ask(tokens(options.shared, 600 + i), 1)[0] for i in range(options.repeats + 1)]
    return {"cold: first token, s": round(statistics.median(times[1:]), 4)}


SCENARIOS = {"turn": turn, "chat": chat, "document": document, "cold": cold}


def measure(run: str, options: argparse.Namespace) -> dict[str, Any]:
    row: dict[str, Any] = {"backend": run}
    with tempfile.TemporaryDirectory() as name:
        driver = Engine(run, _model(Path(name), options), options)
        driver.ask(tokens(options.new, 1), 8)  # what is compiled late
        for scenario in options.scenarios:
            if run == "express, off" and scenario != "cold":
                continue
            row |= SCENARIOS[scenario](driver, options)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def _model(folder: Path, options: argparse.Namespace) -> str:
    if options.model not in SHAPES:
        from express_vllm import smallmodel

        return str(smallmodel.ensure())
    engine.write_config(folder, options.model)
    return str(folder)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.reuse")
    parser.add_argument("--model", choices=(*SHAPES, "smollm2"), default="8b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--memory", type=int, default=2048, help="express's budget, tokens")
    parser.add_argument("--shared", type=int, default=30000)
    parser.add_argument("--new", type=int, default=200)
    parser.add_argument("--document", type=int, default=100000)
    parser.add_argument("--readers", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batched-tokens", type=int, default=8192)
    parser.add_argument("--max-model-len", type=int, default=102400)
    parser.add_argument("--scenarios", nargs="*", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=RUNS)
    parser.add_argument("--name", default="reuse", help="of the file in bench/results/speed/")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the block pool is in this process
    engine.compare("bench.reuse", options.runs, measure, options)


if __name__ == "__main__":
    main()
