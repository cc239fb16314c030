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
#: Cases that take half of the time.
HALF = "a_request_equals or chunking"

if torch.cuda.is_available():
    from kernel_cases import *  # noqa: F403


@pytest.mark.skipif(torch.cuda.is_available(), reason="the cases run compiled")
def test_cases_in_the_interpreter():
    """In two processes, about 30 seconds each."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES), "-k"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    runs = [
        subprocess.Popen(
            [*command, some], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for some in (HALF, f"not ({HALF})")
    ]  # fmt: skip
    printed = [run.communicate()[0] for run in runs]
    print(*printed)
    for run, text in zip(runs, printed, strict=True):
        assert run.returncode == 0, text[-6000:]
        assert " passed" in text
