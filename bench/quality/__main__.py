"""Quality against the peers, at equal peak slots: one command an experiment.

    python -m bench.quality texts              fetch the documents
    python -m bench.quality nll                NLL gap to exact attention
    python -m bench.quality error              error of attention outputs, layer by layer
    python -m bench.quality recall             needles, key-value pairs, repeated passages
    python -m bench.quality sweep              the defaults, on documents of their own
    python -m bench.quality bound              the published bounds on random inputs, no model
    python -m bench.quality report             docs/results.md and plots from the stored results
    python -m bench.quality small              a small version of everything (`make bench`)

Every experiment takes --small, --model, --device, --dtype, --slots, --policies, --documents,
--length; see README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .. import record
from . import bound, error, harness, nll, presses, recall, report, sweep, texts
from .policies import DEFAULT, NAMES, Policy
from .progress import Progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Experiment -> what it does unless told otherwise, in full and small.
FULL: dict[str, dict[str, Any]] = {
    # Few evictions first: a small budget takes the longest.
    "nll": {"slots": [2048, 1024, 512], "length": 8192, "first": 2048, "seeds": [0, 1]},
    "error": {"slots": [1024, 2048], "length": 8192, "first": 3072, "documents": 3,
              "policies": ["express", "paper", "uniform", "streaming", "snapkv", "h2o"]},
    "recall": {"slots": [1024, 2048], "length": 8192,
               "policies": [n for n in NAMES if n != "random"] + ["express:profile=even"]},
    "sweep": {"slots": [512, 1024, 2048], "length": 8192, "first": 2048},
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "nll": {"slots": [512], "length": 3072, "first": 1024, "documents": 3, "seeds": [0]},
    "error": {"slots": [512], "length": 3072, "first": 1536, "documents": 1,
              "policies": ["express", "paper", "streaming", "snapkv"]},
    "recall": {"slots": [1024], "length": 3072, "documents": 2,
               "policies": ["exact", DEFAULT, "express", "express:profile=even", "streaming",
                            "snapkv"]},
    "sweep": {"slots": [512], "length": 3072, "first": 1024, "documents": 2},
}  # fmt: skip
#: A small run looks at prose, code and other languages too.
SMALL_DOCUMENTS = ("anarchism", "docutils", "faq-fr", "fortunes")
#: The most time that each experiment of `small` may take: 18 minutes together.
SMALL_SECONDS = {"nll": 480, "error": 180, "recall": 420}
EXPERIMENTS = tuple(FULL)


def main(argv: list[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    command = arguments.command
    if command == "texts":
        _texts(arguments)
    elif command == "report":
        report.write()
    elif command == "bound":
        _bound()
    elif command == "small":
        arguments.small = True
        texts.fetch(write=False, names=SMALL_DOCUMENTS)
        loaded = _load(arguments)
        for name, seconds in SMALL_SECONDS.items():
            if not arguments.seconds:
                Progress.deadline = time.monotonic() + seconds
            _run(name, argparse.Namespace(**vars(arguments)), *loaded)
        report.write()
    else:
        _run(command, arguments, *_load(arguments))


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench.quality", None, __doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("texts", help="fetch the documents")
    fetch.add_argument("--write", action="store_true", help="accept changed documents")
    fetch.add_argument("--bundle", type=Path, help="store all documents' tokens in this file")
    fetch.add_argument("--model", type=Path, help="whose tokenizer makes the bundle")
    commands.add_parser("report", help="write docs/results.md")
    commands.add_parser("bound", help="the published bounds on random inputs")
    for name in (*EXPERIMENTS, "small"):
        _options(commands.add_parser(name))
    return parser


def _options(one: argparse.ArgumentParser) -> None:
    one.add_argument("--small", action="store_true", help="minutes on two cores")
    one.add_argument("--model", type=Path, help="folder or hub id; default: the small model")
    one.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    one.add_argument("--dtype", choices=DTYPES, help="default: float32, on GPUs bfloat16")
    one.add_argument("--slots", type=int, nargs="+", help="peak slots per layer and KV head")
    one.add_argument(
        "--policies", nargs="+", help="see policies.py; default: all, in the sweep those of --axes"
    )
    one.add_argument("--documents", type=int, help="how many; default: all of the split")
    one.add_argument("--length", type=int, help="tokens of a document or prompt")
    one.add_argument("--first", type=int, help="first position that counts")
    one.add_argument("--seeds", type=int, nargs="+")
    one.add_argument("--axes", nargs="+", choices=list(sweep.AXES), help="of the sweep")
    one.add_argument("--tasks", nargs="+", choices=recall.ALL, default=list(recall.ALL),
                     help="of recall")  # fmt: skip
    one.add_argument("--chunk", type=int, help="tokens of a prefill chunk")
    one.add_argument("--batch", type=int, help="documents at a time; default: 1, on GPUs all")
    one.add_argument("--bundle", type=Path, help="take the documents' tokens from this file")
    one.add_argument("--seconds", type=float, help="stop measuring then and store what is complete")
    one.add_argument("--name", help="of the result file; default: the experiment's")


def _texts(arguments: argparse.Namespace) -> None:
    for entry in texts.fetch(arguments.write):
        print(f"{entry.name:14} {entry.language:10} {entry.kind:9} {entry.package} {entry.version}")
    if arguments.bundle:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(_model_path(arguments.model))
        texts.save_bundle(tokenizer, arguments.bundle, 8192)
        print(f"{arguments.bundle}: {arguments.bundle.stat().st_size / 2**20:.1f} MiB")


def _model_path(given: Path | None) -> Path:
    if given is not None:
        return given
    from express_vllm import smallmodel

    return smallmodel.ensure()


def _load(arguments: argparse.Namespace) -> tuple[Any, Any, str]:
    path = _model_path(arguments.model)
    arguments.dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    model, tokenizer = harness.load(path, arguments.device, DTYPES[arguments.dtype])
    if arguments.seconds:
        Progress.deadline = time.monotonic() + arguments.seconds
    return model, tokenizer, Path(path).name


def _run(name: str, arguments: argparse.Namespace, model: Any, tokenizer: Any, title: str) -> None:
    started = time.monotonic()
    Progress.stopped.clear()
    for key, value in (SMALL if arguments.small else FULL)[name].items():
        if getattr(arguments, key) is None:
            setattr(arguments, key, value)
    on_cpu = arguments.device == "cpu"
    arguments.chunk = arguments.chunk or (2048 if on_cpu else 8192)
    arguments.batch = arguments.batch or (1 if on_cpu else 64)
    arguments.seeds = arguments.seeds or [0]
    heads = harness.heads_of(model)
    measured = {"nll": _nll, "error": _error, "recall": _recall, "sweep": _sweep}[name](
        arguments, model, heads, tokenizer
    )
    rows, details = measured
    stored = arguments.name or name + ("-small" if arguments.small else "")
    path = record.save(
        f"quality-{stored}", rows, experiment=name, command=_command(name),
        model=title, dtype=arguments.dtype, device=arguments.device,
        length=arguments.length, first=arguments.first, chunk=arguments.chunk,
        versions=record.versions("express-vllm", "torch", "transformers", "triton", "numba")
        | {"kvpress": presses.VERSION},
        seconds=round(time.monotonic() - started), stopped=list(Progress.stopped), **details,
    )  # fmt: skip
    print(f"{path.name}: {len(rows)} rows")


def _bound() -> None:
    started = time.monotonic()
    rows = bound.measure()
    path = record.save(
        "quality-bound", rows, experiment="bound", command=_command("bound"), model="no model",
        dtype="float32", device="cpu", length=max(bound.LENGTHS), documents=[],
        versions=record.versions("express-vllm", "torch", "numba"),
        seconds=round(time.monotonic() - started), stopped=[],
    )  # fmt: skip
    print(f"{path.name}: {len(rows)} rows")


def _command(name: str) -> str:
    """As typed, without the folders of this machine."""
    words = [Path(w).name if "/" in w and not w.startswith("-") else w for w in sys.argv[1:]]
    return "python -m bench.quality " + " ".join(words or [name])


def _documents(arguments: argparse.Namespace, split: str, tokenizer: Any) -> dict[str, list[int]]:
    names = [entry.name for entry in texts.manifest() if entry.split == split]
    if arguments.small and split == "report":
        names = list(SMALL_DOCUMENTS)
    names = names[: arguments.documents]
    return texts.tokens(tokenizer, names, max(arguments.length, 4096), arguments.bundle)


def _cut(documents: dict[str, list[int]], length: int) -> dict[str, list[int]]:
    return {name: ids[:length] for name, ids in documents.items()}


def _policies(arguments: argparse.Namespace) -> list[Policy]:
    """Exact once, the others with every number of slots."""
    words = arguments.policies or NAMES
    found = [Policy.parse("exact", 0)] if "exact" in words else []
    return found + [Policy.parse(w, n) for n in arguments.slots for w in words if w != "exact"]


Result = tuple[list[dict[str, Any]], dict[str, Any]]


def _nll(arguments: argparse.Namespace, model: Any, heads: Any, tokenizer: Any) -> Result:
    documents = _cut(_documents(arguments, "report", tokenizer), arguments.length)
    rows = nll.measure(
        model, heads, documents, _policies(arguments), arguments.seeds, arguments.first,
        arguments.chunk, arguments.batch,
    )  # fmt: skip
    return rows, {"documents": list(documents)}


def _sweep(arguments: argparse.Namespace, model: Any, heads: Any, tokenizer: Any) -> Result:
    documents = _cut(_documents(arguments, "choose", tokenizer), arguments.length)
    usual = sweep.SMALL if arguments.small else sweep.AXES
    axes = tuple(arguments.axes or (() if arguments.policies else usual))
    rows = []
    for slots in arguments.slots:
        policies = [Policy.parse(word, slots) for word in arguments.policies or ()]
        policies = policies or sweep.policies(slots, axes, arguments.device, heads)
        rows += nll.measure(
            model, heads, documents, policies, arguments.seeds, arguments.first,
            arguments.chunk, arguments.batch,
        )  # fmt: skip
    return rows, {"documents": list(documents), "axes": list(axes)}


def _error(arguments: argparse.Namespace, model: Any, heads: Any, tokenizer: Any) -> Result:
    documents = _cut(_documents(arguments, "report", tokenizer), arguments.length)
    policies = [p for p in _policies(arguments) if p.name != "exact"]
    rows = error.measure(model, heads, documents, policies, arguments.first, arguments.chunk)
    return rows, {"documents": list(documents)}


def _recall(arguments: argparse.Namespace, model: Any, heads: Any, tokenizer: Any) -> Result:
    documents = _documents(arguments, "report", tokenizer)

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    policies, length = _policies(arguments), arguments.length
    answer = 8  # an answer's tokens must fit the model's context too
    lengths = [length - answer]
    depths = (0.1, 0.5, 0.9) if not arguments.small else (0.5,)
    size = 96
    farthest = length - 4 * size
    distances = [d for d in (6000, 3000, 1500) if d < farthest] or [farthest]
    rows = []
    if "repeated" in arguments.tasks:
        rows += recall.measure_repeated(
            model, heads, documents, policies, distances, length, size, arguments.chunk,
            arguments.batch,
        )  # fmt: skip
    rows += recall.measure(
        model, heads, tokenize, documents, policies, lengths, depths, arguments.chunk,
        arguments.batch, [task for task in recall.TASKS if task in arguments.tasks],
    )  # fmt: skip
    return rows, {"documents": list(documents)}


if __name__ == "__main__":
    main()
