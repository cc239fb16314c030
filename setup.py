"""The import packages and the description; everything else about the project is in pyproject.toml.

`backend/` and `scheduler/` lie at the top level and are imported as `express_vllm.backend` and
`express_vllm.scheduler`.
"""

import re
import tomllib
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def description() -> str:
    """README.md with absolute links, so that it also renders outside the repository."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    repository = project["urls"]["Repository"]
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\1{repository}/raw/main/", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!https?:|#)", rf"\1{repository}/blob/main/", text)


package_dir = {"express_vllm.backend": "backend", "express_vllm.scheduler": "scheduler"}
packages = find_packages(include=["express_vllm", "express_vllm.*"])
for name, folder in package_dir.items():
    packages += [name, *(f"{name}.{sub}" for sub in find_packages(folder))]

setup(
    packages=packages,
    package_dir=package_dir,
    long_description=description(),
    long_description_content_type="text/markdown",
)
