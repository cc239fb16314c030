"""Every package that is imported is among the requirements, and every requirement is used."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: They come with vLLM, whose build depends on the machine.
WITH_VLLM = {"torch", "triton", "vllm"}
#: Not imported: vLLM runs our routes under it.
RUNS_THE_SERVER = {"uvicorn"}


def imported():
    """Top-level packages, of the standard library and our own left out."""
    for folder in ("express_vllm", "backend", "scheduler"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    yield from (alias.name.split(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    yield node.module.split(".")[0]


def names(requirements):
    return {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in requirements}


def test_requirements_are_what_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = names(project["dependencies"])
    found = set(imported()) - set(sys.stdlib_module_names) - {"express_vllm"}
    assert found - needed - names(project["optional-dependencies"]["model"]) == WITH_VLLM
    assert needed - found == RUNS_THE_SERVER
