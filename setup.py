"""The import packages; everything else about the project is in pyproject.toml.

`backend/` and `scheduler/` lie at the top level and are imported as `express_vllm.backend` and
`express_vllm.scheduler`.
"""

from setuptools import find_packages, setup

package_dir = {"express_vllm.backend": "backend", "express_vllm.scheduler": "scheduler"}
packages = find_packages(include=["express_vllm", "express_vllm.*"])
for name, folder in package_dir.items():
    packages += [name, *(f"{name}.{sub}" for sub in find_packages(folder))]

setup(packages=packages, package_dir=package_dir)
