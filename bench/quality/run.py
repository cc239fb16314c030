"""What an experiment gets (a model, documents, the command's options) and how it is stored."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import record
from . import harness, presses, texts
from .harness import Heads
from .progress import Progress

Rows = list[dict[str, Any]]
#: Rows and what else belongs into the result file.
Result = tuple[Rows, dict[str, Any]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: A small run looks at prose, code and other languages too.
SMALL_DOCUMENTS = ("anarchism", "docutils", "faq-fr", "fortunes")
#: Tokens that a document has at least: texts are hidden in each other's.
LEAST = 4096


@dataclass
class Run:
    """A model, its documents (name -> token ids, as many as the options need or more) and the
    command's options."""

    model: Any
    heads: Heads
    tokenizer: Any
    documents: dict[str, list[int]]
    options: argparse.Namespace
    title: str

    def batches(self, stop: int) -> Iterator[tuple[list[str], Tensor]]:
        """Names and the first `stop` token ids [B, stop] of some documents at a time."""
        names = list(self.documents)
        for at in range(0, len(names), self.options.batch):
            part = names[at : at + self.options.batch]
            ids = torch.tensor([self.documents[name][:stop] for name in part])
            yield part, ids.to(self.model.device)

    def tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def add_options(one: argparse.ArgumentParser) -> None:
    """The options of every experiment; None: the experiment's own, for `--small` or in full."""
    on_gpu = torch.cuda.is_available()
    one.add_argument("--small", action="store_true", help="minutes on two cores")
    one.add_argument("--model", type=Path, help="folder or hub id; default: the small model")
    one.add_argument("--device", default="cuda" if on_gpu else "cpu")
    one.add_argument("--dtype", choices=DTYPES, help="default: float32, on GPUs bfloat16")
    one.add_argument("--slots", type=int, nargs="+", help="peak slots, mean over layers")
    one.add_argument("--policies", nargs="+", help="NAME or NAME:FIELD=VALUE,...: see methods/")
    one.add_argument("--documents", type=int, help="how many; default: all of the split")
    one.add_argument("--length", type=int, help="tokens of a document or prompt")
    one.add_argument("--first", type=int, help="first position that counts")
    one.add_argument("--seeds", type=int, nargs="+")
    one.add_argument("--chunk", type=int, help="tokens of a prefill chunk")
    one.add_argument("--batch", type=int, help="documents at a time; default: 1, on GPUs many")
    one.add_argument("--bundle", type=Path, help="take the documents' tokens from this file")
    one.add_argument("--seconds", type=float, help="stop measuring then and store what is complete")
    one.add_argument("--name", help="of the result file; default: the experiment's")


def model_path(given: Path | None) -> Path:
    if given is not None:
        return given
    from express_vllm import smallmodel

    return smallmodel.ensure()


def load(options: argparse.Namespace) -> tuple[Any, Any, str]:
    """-> (model, tokenizer, the model's name)."""
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    path = model_path(options.model)
    model, tokenizer = harness.load(path, options.device, DTYPES[options.dtype])
    return model, tokenizer, Path(path).name


def perform(
    experiment: ModuleType, given: argparse.Namespace, loaded: tuple[Any, Any, str]
) -> Path:
    """Measure and store an experiment: a module with FULL and SMALL (options), SPLIT (of the
    documents), BATCH (on GPUs), FILE (under bench/results/) and `measure`."""
    started = time.monotonic()
    Progress.stopped.clear()
    if given.seconds:
        Progress.deadline = started + given.seconds
    options = argparse.Namespace(**vars(given))
    for key, value in (experiment.SMALL if options.small else experiment.FULL).items():
        if getattr(options, key, None) is None:
            setattr(options, key, value)
    on_cpu = options.device == "cpu"
    options.chunk = options.chunk or (2048 if on_cpu else 8192)
    options.batch = options.batch or (1 if on_cpu else experiment.BATCH)
    options.seeds = options.seeds or [0]
    model, tokenizer, title = loaded
    documents = _documents(options, experiment.SPLIT, tokenizer)
    run = Run(model, harness.heads_of(model), tokenizer, documents, options, title)
    rows, details = experiment.measure(run)
    path = _store(experiment, run, rows, details, round(time.monotonic() - started))
    print(f"{path.name}: {len(rows)} rows")
    return path


def _documents(options: argparse.Namespace, split: str, tokenizer: Any) -> dict[str, list[int]]:
    names = [entry.name for entry in texts.manifest() if entry.split == split]
    if options.small and split == "report":
        names = list(SMALL_DOCUMENTS)
    need = options.length + (getattr(options, "continuation", None) or 0)
    return texts.tokens(tokenizer, names[: options.documents], max(need, LEAST), options.bundle)


def _store(
    experiment: ModuleType, run: Run, rows: Rows, details: dict[str, Any], seconds: int
) -> Path:
    options = run.options
    folder, name = experiment.FILE.split("/")
    about = {
        "experiment": f"paper-{name}" if folder == "paper" else experiment.__name__.split(".")[-1],
        "model": run.title,
        "dtype": options.dtype, "device": options.device, "length": options.length,
        "first": options.first, "chunk": options.chunk, "small": options.small,
        "documents": list(run.documents), "seconds": seconds, "stopped": list(Progress.stopped),
        "versions": record.versions("express-vllm", "torch", "transformers", "triton", "numba")
        | {"kvpress": presses.VERSION},
    }  # fmt: skip
    folder = "small" if options.small else folder
    return record.save(f"{folder}/{options.name or name}", rows, **about | details)
