"""What the API server changes in vLLM, for want of an extension point."""

from __future__ import annotations

import functools
import sys
from typing import Any

#: Set on what was put in place of vLLM's own.
PATCHED = "express_patched"
#: The longest message that vLLM cleans: 20 ms at worst, and that grows with its cube.
LONGEST_MESSAGE = 600
#: vLLM's batch runner, as a command and as a program.
BATCH_RUNNERS = ("vllm.entrypoints.launchers.run_batch", "__main__")


def cut_messages_before_cleaning() -> None:
    """Have vLLM cut an error's message before it takes paths out of it.

    Its pattern for paths is cubic in a text such as "/a/a/a": 16 KB of a request, in the name of
    the model for example, stop the server for half a minute.
    """
    from vllm.entrypoints.serve.exception_handling import utils

    original = utils.sanitize_message
    if hasattr(original, PATCHED):
        return

    @functools.wraps(original)
    def sanitize_message(message: Any) -> str:
        if isinstance(message, str) and len(message) > LONGEST_MESSAGE:
            message = f"{message[:LONGEST_MESSAGE]}... ({len(message)} characters)"
        return original(message)

    setattr(sanitize_message, PATCHED, True)
    # Modules that are loaded hold the function by its name; others will take it from utils.
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and vars(module).get("sanitize_message") is original:
            module.sanitize_message = sanitize_message  # type: ignore[attr-defined]


def budgets_in_batches() -> None:
    """Have every line of `vllm run-batch` go through `batch.answer`."""
    for name in BATCH_RUNNERS:
        module = sys.modules.get(name)
        original = getattr(module, "run_request", None)
        if not hasattr(module, "BatchRequestInput") or original is None:
            continue
        if not hasattr(original, PATCHED):
            from .batch import budgets_in

            wrapped = functools.wraps(original)(budgets_in(original))
            setattr(wrapped, PATCHED, True)
            module.run_request = wrapped  # type: ignore[union-attr]
