"""Quality against the peers, at equal peak slots: one command an experiment.

    python -m bench.quality texts              fetch the documents
    python -m bench.quality nll                NLL gap to exact attention
    python -m bench.quality error              error of attention outputs, layer by layer
    python -m bench.quality recall             needles, key-value pairs, repeated passages
    python -m bench.quality sweep              the defaults, on documents of their own
    python -m bench.quality bound              the published bounds on random inputs, no model
    python -m bench.quality join NAME          the parts NAME.*.json of a result become NAME.json
    python -m bench.quality report             write the tables and plots of docs/results/
    python -m bench.quality report NAME        print a result's tables
    python -m bench.quality small              a small version of everything (`make bench`)

README.md says how each number comes about; methods/ has what is compared.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from types import ModuleType

from .. import record
from . import bound, error, nll, recall, report, sweep, texts
from .progress import Progress
from .run import SMALL_DOCUMENTS, add_options, load, model_path, perform

EXPERIMENTS: dict[str, ModuleType] = {"nll": nll, "error": error, "recall": recall, "sweep": sweep}
#: The most time that each experiment of `small` may take: 18 minutes together.
SMALL_SECONDS = {"nll": 480, "error": 180, "recall": 420}


def main(argv: list[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    command = options.command
    if command == "texts":
        _texts(options)
    elif command == "report":
        _report(options.result)
    elif command == "join":
        print(record.join(options.result))
    elif command == "bound":
        bound.store()
    elif command == "small":
        _small(options)
    else:
        perform(EXPERIMENTS[command], options, load(options))


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench.quality", None, __doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("texts", help="fetch the documents")
    fetch.add_argument("--write", action="store_true", help="accept changed documents")
    fetch.add_argument("--bundle", type=Path, help="store all documents' tokens in this file")
    fetch.add_argument("--model", type=Path, help="whose tokenizer makes the bundle")
    shown = commands.add_parser("report", help="write the tables and plots of docs/results/")
    shown.add_argument("result", nargs="*", help="print these instead: quality/likelihood")
    join = commands.add_parser("join", help="make one result of its parts")
    join.add_argument("result", metavar="NAME", help="under bench/results/: quality/likelihood")
    commands.add_parser("bound", help="the published bounds on random inputs")
    for name in (*EXPERIMENTS, "small"):
        one = commands.add_parser(name)
        add_options(one)
        one.add_argument("--axes", nargs="+", choices=list(sweep.AXES), help="of the sweep")
        one.add_argument("--tasks", nargs="+", choices=recall.ALL, default=list(recall.ALL),
                         help="of recall")  # fmt: skip
    return parser


def _small(options: argparse.Namespace) -> None:
    options.small = True
    texts.fetch(write=False, names=SMALL_DOCUMENTS)
    loaded = load(options)
    for name, seconds in SMALL_SECONDS.items():
        Progress.deadline = time.monotonic() + seconds
        path = perform(EXPERIMENTS[name], options, loaded)
        report.show(f"small/{path.stem}")


def _report(results: list[str]) -> None:
    for result in results:
        report.show(result)
    if not results:
        report.write()


def _texts(options: argparse.Namespace) -> None:
    for entry in texts.fetch(options.write):
        print(f"{entry.name:14} {entry.language:10} {entry.kind:9} {entry.package} {entry.version}")
    if options.bundle:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_path(options.model))
        texts.save_bundle(tokenizer, options.bundle, 8192)
        print(f"{options.bundle}: {options.bundle.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
