"""The import packages and the description; everything else about the project is in pyproject.toml.

`backend/` and `scheduler/` lie at the top level and are imported as `express_vllm.backend` and
`express_vllm.scheduler`.
"""

import re
import tomllib
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def description(repository: str | None) -> str:
    """README.md for where the repository's files are not: links to them are absolute, or plain text
    while pyproject.toml has no address of the repository (`Repository` in `project.urls`)."""
    text = (ROOT / "README.md").read_text()
    if repository is None:
        text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", text)
        return re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\1{repository}/raw/main/", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!https?:|#)", rf"\1{repository}/blob/main/", text)


def project_urls() -> dict[str, str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]


if __name__ == "__main__":
    package_dir = {"express_vllm.backend": "backend", "express_vllm.scheduler": "scheduler"}
    packages = find_packages(include=["express_vllm", "express_vllm.*"])
    for name, folder in package_dir.items():
        packages += [name, *(f"{name}.{sub}" for sub in find_packages(folder))]
    setup(
        packages=packages,
        package_dir=package_dir,
        long_description=description(project_urls().get("Repository")),
        long_description_content_type="text/markdown",
    )
