"""Writes tests/data/cpu-tokens.json: a long greedy decode on the CPU path, for the GPU to repeat.

`python tests/support/cpu_tokens.py` on a machine without a GPU; test_gpu_agreement.py reads the
file.  The prompt is stored too, since its text (realdata.py) is that of one Python version.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from express_vllm import smallmodel

FILE = Path(__file__).parents[1] / "data" / "cpu-tokens.json"
COUNT = 4096


#: Of a server on which a request may have 512 slots in ordinary layers to the slot (budgets lie on
#: a grid, but the least one is granted as it is).
MEMORY = 666
SERVER = {
    "express": {"memory_tokens": MEMORY, "min_memory_tokens": MEMORY, "max_memory_tokens": 1024}
}


def job(prompt):
    """The request: a prompt longer than its 512 slots, continued for COUNT tokens."""
    fields = {"express_memory_tokens": MEMORY, "express_seed": 11}
    return {"prompt": prompt, "max_tokens": COUNT, "extra_args": fields, "margin": True}


def main():
    import realdata
    from engines import run_engine
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(smallmodel.ensure())(realdata.text())["input_ids"]
    prompt = text[500:1400]
    with tempfile.TemporaryDirectory() as folder:
        calls = [("generate", {"requests": [job(prompt)]})]
        (result,) = run_engine(
            Path(folder), "express", calls, timeout=7200, additional_config=SERVER
        )
    rounded = [round(x, 4) for x in result["margins"][0]]
    content = {"prompt": prompt, "tokens": result["tokens"][0], "margins": rounded}
    FILE.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
