"""The experiments of Express Language Modeling (arXiv 2606.10944): one command each.

    python -m bench.quality.paper prefill     prefill's time; perplexity with replaced layers
    python -m bench.quality.paper compress    caches compressed once, after the prompt
    python -m bench.quality.paper size        accuracy against the cache's size in long decoding
    python -m bench.quality.paper time        the same against attention's time a token

Results go to bench/results/quality-paper-*.json; `python -m bench.quality report` makes the tables.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ... import record
from .. import harness, presses, texts
from ..__main__ import DTYPES, SMALL_DOCUMENTS, _model_path
from ..progress import Progress
from . import compress, latency, prefill, size
from .common import Run

EXPERIMENTS: dict[str, ModuleType] = {
    "prefill": prefill, "compress": compress, "size": size, "time": latency,
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    module = EXPERIMENTS[options.experiment]
    for key, value in (module.SMALL if options.small else module.FULL).items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    run = load(options)
    started = time.monotonic()
    if options.seconds:
        Progress.deadline = started + options.seconds
    rows, details = module.measure(run)
    path = store(run, rows, round(time.monotonic() - started), details)
    print(f"{path.name}: {len(rows)} rows")


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    one = argparse.ArgumentParser("python -m bench.quality.paper", None, __doc__,
                                  formatter_class=raw)  # fmt: skip
    one.add_argument("experiment", choices=list(EXPERIMENTS))
    one.add_argument("--small", action="store_true", help="three minutes on one core")
    one.add_argument("--model", type=Path, help="folder or hub id; default: the small model")
    one.add_argument("--data", type=Path,
                     help='size: lines of {"question": ..., "answer": ...}')  # fmt: skip
    one.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    one.add_argument("--dtype", choices=DTYPES, help="default: float32, on GPUs bfloat16")
    one.add_argument("--seconds", type=float, help="stop measuring then and store what is complete")
    one.add_argument("--bundle", type=Path, help="take the documents' tokens from this file")
    one.add_argument("--documents", type=int, help="how many; default: all of the split")
    one.add_argument("--length", type=int, help="tokens of a document, or of a prompt")
    one.add_argument("--first", type=int, help="size, time: tokens of the prompt")
    one.add_argument("--slots", type=int, nargs="+", help="budgets; size: in place of the shares")
    one.add_argument("--policies", nargs="+", help="size, time: see ../policies.py")
    one.add_argument("--continuation", type=int, help="compress: tokens that are scored")
    one.add_argument("--depths", type=float, nargs="+", help="compress: where the fact stands")
    one.add_argument("--lengths", type=int, nargs="+", help="prefill: tokens of the timed prompts")
    one.add_argument("--requests", type=int, help="time: requests of the timed batch")
    one.add_argument("--questions", type=int, help="size: how many lines of --data")
    one.add_argument("--answer", type=int, help="size: most tokens of an answer")
    one.add_argument("--seeds", type=int, nargs="+")
    one.add_argument("--chunk", type=int, help="tokens of a prefill chunk")
    one.add_argument("--batch", type=int, help="documents at a time; default: 1, on GPUs 16")
    one.add_argument("--name", help="of the result file; default: paper-<experiment>")
    return one


def load(options: argparse.Namespace) -> Run:
    """The model and the documents; settings that the machine decides are filled in."""
    on_cpu = options.device == "cpu"
    options.dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
    options.chunk = options.chunk or (2048 if on_cpu else 8192)
    options.batch = options.batch or (1 if on_cpu else 16)
    options.seeds = options.seeds or [0]
    path = _model_path(options.model)
    model, tokenizer = harness.load(path, options.device, DTYPES[options.dtype])
    names = [entry.name for entry in texts.manifest() if entry.split == "report"]
    if options.small:
        names = list(SMALL_DOCUMENTS)
    need = options.length + (options.continuation or 0)
    documents = texts.tokens(tokenizer, names[: options.documents], need, options.bundle)
    return Run(model, harness.heads_of(model), tokenizer, documents, options, Path(path).name)


def store(run: Run, rows: list[dict[str, Any]], seconds: int, details: dict[str, Any]) -> Path:
    options = run.options
    name = options.name or f"paper-{options.experiment}" + ("-small" if options.small else "")
    # As typed, without the folders of this machine.
    words = [Path(w).name if "/" in w and not w.startswith("-") else w for w in sys.argv[1:]]
    return record.save(
        f"quality-{name}", rows, experiment=f"paper-{options.experiment}",
        command="python -m bench.quality.paper " + " ".join(words), model=run.title,
        dtype=options.dtype, device=options.device, length=options.length,
        small=options.small, documents=list(run.documents), seconds=seconds,
        versions=record.versions("express-vllm", "torch", "transformers", "triton", "numba")
        | {"kvpress": presses.VERSION},
        stopped=list(Progress.stopped), **details,
    )  # fmt: skip


if __name__ == "__main__":
    main()
