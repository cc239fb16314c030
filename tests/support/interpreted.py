"""A script that runs kernels in Triton's interpreter, which a process chooses when it starts."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def assert_same(script):
    """`script`, run from the repository's root, prints "same" at its end."""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.stdout.strip().endswith("same"), done.stdout[-2000:] + done.stderr[-4000:]
