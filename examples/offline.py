"""Requests with budgets of their own in one batch, without a server.

    .venv/bin/python examples/offline.py                        # the small model
    .venv/bin/python examples/offline.py --model /folder/or/hub-id

What a budget may say: docs/budgets.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm import LLM, SamplingParams

TEXT = Path(__file__).resolve().parent.parent / "LICENSE"
#: A cache of 256 tokens, one of a tenth of what exact attention would take, and all tokens.
BUDGETS = (
    {"express_memory_tokens": 256},
    {"express_memory": "10%", "express_profile": "even"},
    {"express_mode": "exact"},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder or a hub id; by default the small model")
    parser.add_argument("--eager", action="store_true", help="for machines without a C++ compiler")
    options = parser.parse_args()
    llm = LLM(
        model=options.model or small_model(),
        attention_backend="express",
        enforce_eager=options.eager,
        max_num_seqs=len(BUDGETS),
        additional_config={"express": {"memory_tokens": 1024}},
    )
    prompt = TEXT.read_text() + "\n\nIn short, this licence"
    params = [SamplingParams(temperature=0, max_tokens=24, extra_args=b) for b in BUDGETS]
    outputs = llm.generate([prompt] * len(BUDGETS), params, use_tqdm=False)
    for budget, output in zip(BUDGETS, outputs, strict=True):
        print(f"{budget}: {output.outputs[0].text!r}")


def small_model() -> str:
    from express_vllm import smallmodel

    return str(smallmodel.ensure())


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
