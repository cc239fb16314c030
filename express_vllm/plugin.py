"""vLLM entry points: the backend's name and the platform that selects everything else."""

from __future__ import annotations

import copyreg
from typing import Any

BACKEND_NAME = "EXPRESS"
BACKEND_PATH = "express_vllm.backend.attention.ExpressBackend"


def register() -> None:
    """`vllm.general_plugins` entry point: make `--attention-backend express` known."""
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
        register()
    return AttentionBackendEnum[name]


def platform() -> str | None:
    """`vllm.platform_plugins` entry point: our subclass of the platform that vLLM would pick.

    Loads before general plugins, so the backend's name is registered here too: offline
    `LLM(attention_config=...)` looks it up that early.
    """
    from vllm.platforms import builtin_platform_plugins

    found = [name for name, detect in builtin_platform_plugins.items() if detect() is not None]
    register()
    if found == ["cuda"]:
        return "express_vllm.platforms.cuda.ExpressCudaPlatform"
    if found == ["cpu"]:
        return "express_vllm.platforms.cpu.ExpressCpuPlatform"
    return None
