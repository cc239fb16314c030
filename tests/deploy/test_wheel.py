"""The source distribution, the wheel made from it, and what is installed from that."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: What .dockerignore lets through too: the images build from these.
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
PACKAGES = {"express_vllm": "express_vllm", "backend": "express_vllm/backend",
            "scheduler": "express_vllm/scheduler"}  # fmt: skip
IMPORT = """
from importlib.util import find_spec
import express_vllm.layout, express_vllm.plugin
print(express_vllm.__file__)
for name in ("backend.attention", "scheduler.manager"):
    print(find_spec("express_vllm." + name).origin)
"""


def run(*command, **options):
    done = subprocess.run([sys.executable, *command], text=True, capture_output=True, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which the sdist's wheel was installed, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; build_meta.build_sdist('..')"
    run("-c", build, cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    build = "from setuptools import build_meta; build_meta.build_wheel('../..')"
    run("-c", build, cwd=unpacked)
    (wheel,) = folder.glob("*.whl")
    target = folder / "target"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    return target


def test_every_file_of_the_packages_is_installed(installed):
    """Modules, page.html, JSON, C++ and CUDA sources, py.typed; and nothing else."""
    wanted = {
        f"{place}/{path.relative_to(ROOT / name)}"
        for name, place in PACKAGES.items()
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = {
        str(path.relative_to(installed)) for path in installed.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }  # fmt: skip
    assert wanted <= held, wanted - held
    others = {name for name in held - wanted if ".dist-info/" not in name}
    assert others == {"bin/express-vllm"}


def test_the_package_is_imported_from_there(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    files = run("-c", IMPORT, cwd=tmp_path, env=environment).split()[-3:]
    assert len(files) == 3
    for file in files:
        assert Path(file).is_relative_to(installed), file


def test_vllm_finds_the_plugin_there(installed, tmp_path):
    code = (
        "from importlib.metadata import distribution as d;"
        "[print(e.group, e.load().__module__) for e in d('express-vllm').entry_points"
        " if e.group.startswith('vllm')]"
    )
    environment = os.environ | {"PYTHONPATH": str(installed)}
    found = run("-c", code, cwd=tmp_path, env=environment).splitlines()[-2:]
    assert sorted(found) == [
        "vllm.general_plugins express_vllm.plugin", "vllm.platform_plugins express_vllm.plugin",
    ]  # fmt: skip
