"""Writes tests/data/cpu-tokens.json: a long greedy decode on the CPU path, for the GPU to repeat.

`python tests/cpu_tokens.py` on a machine without a GPU; test_gpu_agreement.py reads the file.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from express_vllm import smallmodel

FILE = Path(__file__).with_name("data") / "cpu-tokens.json"
COUNT = 4096


def job(tokens):
    """The request: 900 tokens of real text in 512 slots, continued for COUNT tokens."""
    fields = {"express_memory_tokens": 512, "express_seed": 11}
    return {
        "prompt": tokens[500:1400], "max_tokens": COUNT, "extra_args": fields, "margin": True,
    }  # fmt: skip


def main():
    import realdata
    from test_engine import run_engine
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(smallmodel.ensure())(realdata.text())["input_ids"]
    with tempfile.TemporaryDirectory() as folder:
        calls = [("generate", {"requests": [job(tokens)]})]
        (result,) = run_engine(Path(folder), "express", calls)
    rounded = [round(x, 4) for x in result["margins"][0]]
    FILE.write_text(json.dumps({"tokens": result["tokens"][0], "margins": rounded}) + "\n")


if __name__ == "__main__":
    main()
