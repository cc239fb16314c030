"""vLLM entry points: the backend's name and the platform that selects everything else."""

from __future__ import annotations

import copyreg
import logging
from importlib import metadata
from typing import Any

logger = logging.getLogger("vllm.express")

#: The release of vLLM that this one was tested with.
SUPPORTED_VLLM = "0.32"
BACKEND_NAME = "EXPRESS"
BACKEND_PATH = "express_vllm.backend.attention.ExpressBackend"


def untested_vllm() -> str | None:
    """The installed version of vLLM if it was not tested, else None."""
    version = metadata.version("vllm")
    return None if version.startswith(SUPPORTED_VLLM + ".") else version


def register() -> None:
    """`vllm.general_plugins` entry point: make `--attention-backend express` known.

    Not without the platform, which would leave express out silently: then vLLM refuses the name,
    and this says why.
    """
    from vllm.platforms import current_platform

    if type(current_platform).__module__.startswith("express_vllm."):
        _register_backend()
    elif version := untested_vllm():
        logger.error(
            "express: --attention-backend express is off: it was tested with vLLM %s.*, not with "
            "%s. Install vllm==%s.*",
            SUPPORTED_VLLM, version, SUPPORTED_VLLM,
        )  # fmt: skip
    else:
        logger.error(
            "express: --attention-backend express is off: vLLM chose the platform %s. Unset "
            "VLLM_TARGET_DEVICE; machines other than CPUs and NVIDIA GPUs are not supported",
            type(current_platform).__name__,
        )


def _register_backend() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND_NAME in AttentionBackendEnum.__members__:
        return
    register_backend(BACKEND_NAME, BACKEND_PATH)
    # A member registered at run time does not unpickle in a spawned process that has not loaded
    # plugins yet; the reducer's restore function loads this one first.
    copyreg.pickle(AttentionBackendEnum, _reduce_backend)


def _reduce_backend(member: Any) -> tuple[Any, tuple[str]]:
    return _restore_backend, (member.name,)


def _restore_backend(name: str) -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if name == BACKEND_NAME:
        _register_backend()
    return AttentionBackendEnum[name]


def platform() -> str | None:
    """`vllm.platform_plugins` entry point: our subclass of the platform that vLLM would pick.

    Loads before general plugins, so the backend's name is registered here too: offline
    `LLM(attention_config=...)` looks it up that early.
    """
    from vllm.platforms import builtin_platform_plugins

    found = [name for name, detect in builtin_platform_plugins.items() if detect() is not None]
    if untested_vllm() or found not in (["cuda"], ["cpu"]):
        return None  # `register` says why
    _register_backend()
    if found == ["cuda"]:
        return "express_vllm.platforms.cuda.ExpressCudaPlatform"
    return "express_vllm.platforms.cpu.ExpressCpuPlatform"
