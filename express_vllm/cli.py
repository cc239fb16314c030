"""`express-vllm`: check an installation or a configuration, print the conflict matrix."""

from __future__ import annotations

import argparse
import json
import platform as machine
import signal
import sys
from collections.abc import Callable
from importlib import metadata

from .config import ServerConfig
from .conflicts import CONFLICTS, LAYER_CONFLICTS, matrix
from .plugin import BACKEND_NAME, SUPPORTED_VLLM, untested_vllm

#: Whose versions a report of a fault needs.
PACKAGES = ("express-vllm", "vllm", "torch", "numba", "triton", "fastapi", "uvicorn")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="express-vllm", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="check this installation")
    commands.add_parser("conflicts", help="print the conflict matrix as Markdown")
    check = commands.add_parser("check", help="check an --additional-config value")
    check.add_argument("config", help="""JSON, such as '{"express": {"memory_tokens": 1024}}'""")
    options = parser.parse_args(arguments)
    if arguments is None:
        # The process is ours.  A reader that closes the pipe (`| head -1`) ends it, as it ends
        # other commands: Python's way is an error, from vLLM's logger too.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if options.command == "doctor":
        sys.exit(doctor())
    if options.command == "check":
        sys.exit(check_config(options.config))
    print(matrix(), end="")


def doctor() -> int:
    """Print the report; 0 if express can be served on this machine."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("python", lambda: f"{machine.python_version()} on {machine.platform()}"),
        *[(name, _version(name)) for name in PACKAGES],
        ("vllm is supported", _supported),
        ("platform", _platform),
        ("backend registered", _registered),
    ]
    failed = 0
    for name, run in checks:
        try:
            result = run()
        except Exception as error:  # the report goes on, whatever is broken
            failed += name != "triton"
            result = f"NO: {type(error).__name__}: {error}"
        print(f"{name:20} {result}")
    print("\nRefused at start-up with --attention-backend express:")
    for conflict in CONFLICTS:
        print(f"  - {conflict.feature}: {conflict.reason}; {conflict.remedy}")
    for feature, reason in LAYER_CONFLICTS.items():
        print(f"  - {feature}: {reason}")
    print("\n" + ("something is wrong: see NO above" if failed else "ready"))
    return 1 if failed else 0


def check_config(text: str) -> int:
    """Say whether the operator's configuration is accepted, and which cache it gives."""
    try:
        config = ServerConfig.parse(json.loads(text).get("express", {}))
    except (ValueError, AttributeError) as error:
        print(f"refused: {error}")
        return 1
    print(config)
    print(config.shape(config.memory_tokens, config.profile))
    return 0


def _version(name: str) -> Callable[[], str]:
    return lambda: metadata.version(name)


def _supported() -> str:
    if version := untested_vllm():
        raise RuntimeError(f"version {version} is installed, {SUPPORTED_VLLM}.* is needed")
    return f"yes, {SUPPORTED_VLLM}.*"


def _platform() -> str:
    from vllm.platforms import current_platform

    name = type(current_platform).__qualname__
    if not name.startswith("Express"):
        raise RuntimeError(
            f"vLLM chose {name}: this machine's device is not supported yet, VLLM_PLUGINS leaves "
            "out 'express', or VLLM_TARGET_DEVICE is set"
        )
    return name


def _registered() -> str:
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    load_general_plugins()
    return f"yes, {AttentionBackendEnum[BACKEND_NAME].get_path()}"
