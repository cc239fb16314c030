"""Every variant of the kernels compiles for sm_90, on any machine (marker `slow`)."""

import itertools
import os
import subprocess
import sys

import pytest
from engines import SUPPORT

pytest.importorskip("triton.backends.nvidia")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "size"),
    [*itertools.product(["bf16", "fp16", "fp32"], [64, 96, 128, 256]), ("bf16", 72), ("bf16", 120)],
)
def test_every_variant_compiles(dtype, size):
    """In a process of its own: other modules may have loaded Triton's interpreter."""
    script = SUPPORT / "compile_kernels.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(script), "--models", f"{dtype}:{size}"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    print(run.stdout)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
