"""The experiments of Express Language Modeling (arXiv 2606.10944): one command each.

    python -m bench.quality.paper prefill     prefill's time; perplexity with replaced layers
    python -m bench.quality.paper compress    caches compressed once, after the prompt
    python -m bench.quality.paper size        accuracy against the cache's size in long decoding
    python -m bench.quality.paper time        the same against attention's time a token

Results go to bench/results/paper/; `python -m bench.quality report` makes the tables.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType

from ..run import add_options, load, perform
from . import compress, latency, prefill, size

EXPERIMENTS: dict[str, ModuleType] = {
    "prefill": prefill, "compress": compress, "size": size, "time": latency,
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    perform(EXPERIMENTS[options.experiment], options, load(options))


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    one = argparse.ArgumentParser("python -m bench.quality.paper", None, __doc__,
                                  formatter_class=raw)  # fmt: skip
    one.add_argument("experiment", choices=list(EXPERIMENTS))
    add_options(one)
    one.add_argument("--data", type=Path,
                     help='size: lines of {"question": ..., "answer": ...}')  # fmt: skip
    one.add_argument("--continuation", type=int, help="compress: tokens that are scored")
    one.add_argument("--depths", type=float, nargs="+", help="compress: where the fact stands")
    one.add_argument("--lengths", type=int, nargs="+", help="prefill: tokens of the timed prompts")
    one.add_argument("--requests", type=int, help="time: requests of the timed batch")
    one.add_argument("--questions", type=int, help="size: how many lines of --data")
    one.add_argument("--answer", type=int, help="size: most tokens of an answer")
    return one


if __name__ == "__main__":
    main()
