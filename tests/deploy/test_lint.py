"""Style and types: what `make lint` checks, in every run of the tests."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUFF = [sys.executable, "-m", "ruff"]


@pytest.mark.parametrize(
    "command",
    [[*RUFF, "check", "."], [*RUFF, "format", "--check", "."], ["deploy/mypy.sh"]],
    ids=["style", "format", "types"],
)
def test_nothing_is_found(command):
    found = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert found.returncode == 0, found.stdout + found.stderr
