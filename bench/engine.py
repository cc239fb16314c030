"""vLLM end to end on a GPU, express beside FLASH_ATTN: `python -m bench.engine`.

A Llama-3.1-8B with random weights (its speed is that of the real one), or a 70B over several GPUs:
`--shape 70b --tensor-parallel-size 2 --name engine-70b`.  Measured of each backend:

- time to first token of one prompt, median of the repeats;
- tokens per second in long-form decoding with as many requests as fit: every request has a prompt
  of 1K tokens and grows by 8K or 16K.  The step time is measured over `--window` steps at several
  lengths and averaged over the way; `--whole` decodes all of it instead.

On several GPUs also the collectives between them in a step, counted and timed by vLLM's profiler.

Each backend runs in a process of its own, one after the other on the same device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import record, traces
from express_vllm.config import ServerConfig

BACKENDS = ("FLASH_ATTN", "express")
PROMPT = 1024
#: Llama-3.1's shapes (their RoPE scaling does not change their speed).
SHAPES = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 1 << 20,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def tokens(count: int, seed: int, most: int = 100000) -> list[int]:
    """Random ones, below `most`."""
    generator = random.Random(seed)
    return [generator.randrange(1000, most) for _ in range(count)]


def write_config(folder: Path, shape: str) -> None:
    """What vLLM needs of a model with random weights."""
    (folder / "config.json").write_text(json.dumps(CONFIG | SHAPES[shape]))


class Driver:
    """A vLLM `LLM` that is driven step by step."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.engine = llm.llm_engine
        self.count = 0

    def add(self, prompt: list[int], max_tokens: int) -> str:
        from vllm import SamplingParams

        self.count += 1
        name = f"request-{self.count}"
        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        return name


class Engine(Driver):
    """What `bench.engine` measures."""

    def __init__(self, backend: str, folder: Path, options: argparse.Namespace) -> None:
        from vllm import LLM

        arguments: dict[str, Any] = {}
        if options.tensor_parallel_size > 1:
            arguments["profiler_config"] = traces.options(folder)
        if backend == "express":
            config = {
                "memory_tokens": options.memory, "max_memory_tokens": options.memory,
                "wide_layers": options.wide_layers,
            }  # fmt: skip
            arguments["additional_config"] = {"express": config}
        llm = LLM(
            str(folder), attention_backend=backend, load_format="dummy", skip_tokenizer_init=True,
            max_model_len=max(*prompts(backend, options), PROMPT + max(options.outputs)) + 64,
            max_num_batched_tokens=options.batched_tokens,
            enable_prefix_caching=False, max_num_seqs=options.max_num_seqs, dtype="bfloat16",
            tensor_parallel_size=options.tensor_parallel_size, disable_log_stats=True,
            gpu_memory_utilization=options.gpu_memory_utilization, **arguments,
        )  # fmt: skip
        super().__init__(llm)

    def slots(self) -> int:
        cache = self.engine.vllm_config.cache_config
        return cache.num_gpu_blocks * cache.block_size

    @contextlib.contextmanager
    def profiled(self, name: str) -> Iterator[None]:
        if name:
            self.llm.start_profile(name)
        yield
        if name:
            self.llm.stop_profile()

    def first_token(self, length: int) -> float:
        """Seconds from the request to its only token."""
        start = time.perf_counter()
        self.add(tokens(length, self.count), 1)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return time.perf_counter() - start

    def decode(
        self, requests: int, length: int, window: int, most: int, profile: str = ""
    ) -> tuple[float, int]:
        """Seconds in which all requests gain `window` tokens, and the tokens of all together; a
        request asks for `most`.  The window may be profiled under a name."""
        names = [self.add(tokens(length, i), most) for i in range(requests)]
        seen = dict.fromkeys(names, 0)

        def run_until(least: int) -> None:
            while min(seen.values()) < least:
                for output in self.engine.step():
                    seen[output.request_id] = len(output.outputs[0].token_ids)

        run_until(8)
        begin, base = time.perf_counter(), sum(seen.values())
        with self.profiled(profile):
            run_until(8 + window)
        seconds, count = time.perf_counter() - begin, sum(seen.values()) - base
        if window + 8 < most:
            self.engine.abort_request(names)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return seconds, count


def prompts(backend: str, options: argparse.Namespace) -> list[int]:
    return options.lengths + (options.more_lengths if backend == "express" else [])


def ordinary_slots(options: argparse.Namespace) -> int:
    """Of a layer that is not wide; the memory is the mean over all layers."""
    layers = int(SHAPES[options.shape]["num_hidden_layers"])
    more = len(options.wide_layers) * (ServerConfig.wide_factor - 1)
    return options.memory * layers // (layers + more)


def fitting(engine: Engine, backend: str, output: int, options: argparse.Namespace) -> int:
    """Requests whose whole length fits."""
    each = ordinary_slots(options) if backend == "express" else PROMPT + output
    return min(options.max_num_seqs, engine.slots() // each)


def measure(backend: str, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_config(folder, options.shape)
        begin = time.perf_counter()
        engine = Engine(backend, folder, options)
        row: dict[str, Any] = {
            "backend": backend, "start, s": round(time.perf_counter() - begin),
            "KV slots": engine.slots(),
        }  # fmt: skip
        engine.first_token(options.lengths[0])  # what is compiled late
        for length in prompts(backend, options):
            times = [engine.first_token(length) for _ in range(options.repeats)]
            row[f"first token at {length}, s"] = round(statistics.median(times), 3)
            print(json.dumps(row), file=sys.stderr, flush=True)
        if options.window:
            row |= long_form(engine, backend, options)
        if options.tensor_parallel_size > 1:
            row |= communication(engine, folder)
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def communication(engine: Engine, folder: Path) -> dict[str, Any]:
    """Collectives of the step of a prompt and of a step of several decoding requests."""
    length, requests = 8192, 32
    with engine.profiled("prefill"):
        engine.first_token(length)
    engine.decode(requests, PROMPT, 16, 64, profile="decode")
    row: dict[str, Any] = {}
    for name, step in (("prefill", f"step of {length} tokens"), ("decode", f"step of {requests}")):
        try:
            count, seconds = traces.collectives(folder, name)
        except (OSError, ValueError) as error:  # minutes of other figures are not lost for it
            row[f"collectives, {step}"] = f"not counted: {error}"
            continue
        row |= {f"collectives, {step}": count, f"their time, {step}, ms": round(1e3 * seconds, 3)}
    return row


def long_form(engine: Engine, backend: str, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second for each length of output."""
    row: dict[str, Any] = {}
    known: dict[tuple[int, int], float] = {}
    for output in options.outputs:
        requests = fitting(engine, backend, output, options)
        row[f"requests, {output} tokens of output"] = requests
        if options.whole:
            seconds, count = engine.decode(requests, PROMPT, output - 9, output)
            row[f"tokens/s, {output} tokens of output"] = round(count / seconds)
            continue
        lengths = measured_lengths(backend, output, requests, options)
        for length in lengths:
            if (requests, length) not in known:
                seconds, count = engine.decode(requests, length, options.window, output)
                known[requests, length] = step = seconds * requests / count
                row[f"step of {requests} at {length}, ms"] = round(1000 * step, 2)
                print(f"{backend} {requests} x {length}: {1000 * step:.2f} ms", file=sys.stderr)
        steps = [known[requests, length] for length in lengths]
        way = np.linspace(PROMPT, PROMPT + output, 1000)
        mean = float(np.interp(way, lengths, steps).mean())
        row[f"tokens/s, {output} tokens of output"] = round(requests / mean)
    return row


def measured_lengths(
    backend: str, output: int, requests: int, options: argparse.Namespace
) -> list[int]:
    """Lengths at which the step is timed.  Past the slots of its layers a request's step does not
    depend on its length, so express is not measured far beyond them (`--whole` is the check)."""
    # The first requests decode while the last ones' prompts are read; all must fit to the end.
    last = PROMPT + output - options.window - 8
    last -= requests * last // options.batched_tokens
    if backend == "express":
        wide = ServerConfig.wide_factor if options.wide_layers else 1
        slots = ordinary_slots(options)
        past = (slots * 5 // 4, slots * 2, slots * wide * 5 // 4)
        return sorted({PROMPT, *(min(last, length) for length in past)})
    return [PROMPT, (PROMPT + last) // 2, last]


def in_process(backend: str, module: str) -> dict[str, Any]:
    """Run a benchmark for one backend in a fresh process group, which leaves the device empty."""
    with tempfile.NamedTemporaryFile("r") as file:
        command = [sys.executable, "-m", module, *sys.argv[1:], "--only", backend]
        process = subprocess.Popen([*command, "--output", file.name], start_new_session=True)
        try:
            if process.wait():
                raise RuntimeError(f"{backend} ended with {process.returncode}")
        finally:
            _end(process.pid)
        return json.loads(file.read())


def _end(group: int) -> None:
    """Kill what is left of a process group (the engine's core outlives its parent) and wait."""
    with contextlib.suppress(ProcessLookupError):
        for _ in range(100):
            os.killpg(group, signal.SIGKILL)
            time.sleep(0.1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.engine")
    parser.add_argument("--lengths", type=int, nargs="*", default=[8192, 32768, 131072])
    parser.add_argument("--more-lengths", type=int, nargs="*", default=[], help="express only")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=int, default=2048, help="express's memory budget, tokens")
    parser.add_argument("--wide-layers", type=int, nargs="*", default=[], help="of express")
    parser.add_argument("--batched-tokens", type=int, default=8192)
    parser.add_argument("--outputs", type=int, nargs="*", default=[8192, 16384])
    parser.add_argument("--window", type=int, default=256, help="steps a length; 0: no decoding")
    parser.add_argument("--whole", action="store_true", help="decode the whole output")
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="of Llama-3.1")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--max-num-seqs", type=int, default=256, help="requests at once, at most")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.92)
    parser.add_argument("--name", default="engine", help="of the file in bench/results/speed/")
    parser.add_argument("--backends", nargs="*", default=BACKENDS)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(
    module: str,
    backends: Sequence[str],
    measure: Callable[[str, argparse.Namespace], dict[str, Any]],
    options: argparse.Namespace,
    devices: int = 1,
) -> None:
    """Measure each backend in a process of its own, which is the benchmark `module` with `--only`,
    store the rows and print them."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.only:
        Path(options.output).write_text(json.dumps(measure(options.only, options)))
        sys.stdout.flush()
        os._exit(0)  # the engine's teardown is not measured
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that engines are ended too
    rows: list[dict[str, Any]] = []
    for backend in backends:
        rows.append(in_process(backend, module))
        path = record.save(f"speed/{options.name}", rows, hardware=record.hardware(devices))
    print(record.table(transposed(rows)))
    print(f"stored in {path}")


def main() -> None:
    options = arguments()
    compare("bench.engine", options.backends, measure, options, options.tensor_parallel_size)


def transposed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a figure, one column a backend, the last against the first."""
    lines = []
    for name in dict.fromkeys(key for row in rows for key in row if key != "backend"):
        line = {"figure": name} | {row["backend"]: row.get(name, "") for row in rows}
        values = [v for row in rows if isinstance(v := row.get(name), int | float) and v]
        compared = len(rows) == len(values) == 2
        line["second / first"] = round(values[1] / values[0], 3) if compared else ""
        lines.append(line)
    return lines


if __name__ == "__main__":
    main()
