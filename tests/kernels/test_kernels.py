"""The Triton kernels: compiled on a GPU (marker `gpu`), else in Triton's interpreter.

The interpreter must be chosen before Triton is loaded, and vLLM loads it in other tests' modules:
so the cases run in a process of their own where there is no GPU.
"""

import os
import subprocess
import sys

import pytest
import torch
from engines import SUPPORT

pytest.register_assert_rewrite("kernel_cases")
CASES = SUPPORT / "kernel_cases.py"

if torch.cuda.is_available():
    from kernel_cases import *  # noqa: F403


@pytest.mark.skipif(torch.cuda.is_available(), reason="the cases run compiled")
def test_cases_in_the_interpreter():
    """About 40 seconds on one core."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "passed" in run.stdout
