"""Store a benchmark's rows with everything needed to repeat it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
#: What makes a row of a result one of its own: of several with the same values the first counts.
KEYS = ("policy", "slots", "seed", "document", "task", "length", "depth", "distance")


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


def commit() -> str:
    """Of the code that is measured, with `-dirty` if files differ from it; `unknown` if that code
    is not a checkout's."""
    import express_vllm

    if Path(express_vllm.__file__).resolve().parents[1] != ROOT.resolve():
        return "unknown"  # an installed copy
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != ROOT.resolve():
            return "unknown"  # a copy that lies in another repository
        found = _git("rev-parse", "HEAD")
        results = ":(exclude)bench/results"  # what is stored now is not what is measured
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", results)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found + "-dirty" * bool(changed)


def _git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def typed() -> str:
    """The command of this process, without the folders of this machine."""
    module = sys.modules["__main__"].__spec__.name.removesuffix(".__main__")
    words = [Path(w).name if "/" in w and Path(w).exists() else w for w in sys.argv[1:]]
    return " ".join(["python -m", module, *words])


def save(name: str, rows: Sequence[Mapping[str, Any]], **details: Any) -> Path:
    """Write bench/results/<name>.json; -> its path."""
    record = {
        "command": typed(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": versions("express-vllm", "vllm", "torch", "numba", "triton"),
        **details,
        "rows": list(rows),
    }
    return _write(name, record)


def _write(name: str, record: Mapping[str, Any]) -> Path:
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def join(name: str) -> Path:
    """Make bench/results/<name>.json of its parts <name>.*.json, which go; -> its path.

    Parts are runs of one experiment on one kind of machine, each with some of the rows.
    """
    paths = sorted(RESULTS.glob(f"{name}.*.json"))
    if not paths:
        raise FileNotFoundError(f"{RESULTS / name}.*.json: there are no parts to join")
    parts = [json.loads(path.read_text()) for path in paths]
    path = _write(name, {"command": typed()} | joined(parts))
    for part in paths:
        part.unlink()
    return path


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result of several; `parts` says how each of them was measured."""
    found = dict(parts[0])
    for key in ("experiment", "model", "dtype", "hardware", "length", "documents", "versions"):
        if any(part.get(key) != found.get(key) for part in parts):
            raise ValueError(f"parts of one result differ in {key}")
    rows: dict[tuple, dict[str, Any]] = {}
    for row in (row for part in parts for row in part["rows"]):
        rows.setdefault(tuple(row.get(key) for key in KEYS), row)
    told = ("command", "commit", "date", "seconds")
    found["parts"] = [{k: part[k] for k in told if k in part} for part in parts]
    for key in ("command", "commit"):
        found.pop(key, None)
    found["seconds"] = sum(part["seconds"] for part in parts)
    found["stopped"] = [title for part in parts for title in part["stopped"]]
    if "axes" in found:
        found["axes"] = list(dict.fromkeys(axis for part in parts for axis in part["axes"]))
    found["rows"] = list(rows.values())
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; every row has the keys of the first."""
    if not rows:
        return "Nothing was measured."
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    lines += ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines)
