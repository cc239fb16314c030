"""Store a benchmark's rows with everything needed to repeat it."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def hardware(devices: int = 1) -> str:
    """The accelerator's name and number, or the processor's name with its number of cores."""
    import torch

    if torch.cuda.is_available():
        return (f"{devices} x " if devices > 1 else "") + torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {torch.get_num_threads()} cores"
    return platform.processor()


def versions(*names: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def save(name: str, rows: Sequence[Mapping[str, Any]], **details: Any) -> Path:
    """Write bench/results/<name>.json; -> its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    module = sys.modules["__main__"].__spec__.name.removesuffix(".__main__")
    record = {
        "command": f"python -m {module} " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": versions("express-vllm", "vllm", "torch", "numba", "triton"),
        **details,
        "rows": list(rows),
    }
    record["command"] = record["command"].strip()
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; every row has the keys of the first."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    lines += ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines)
