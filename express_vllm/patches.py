"""Every change to vLLM that has no extension point: one function each, applied when it is needed.

`tests/test_patches.py` holds what they rely on against the installed vLLM.
"""

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


def resolve_at_the_edge() -> None:
    """Have `edge.Edge.admit` called on every request that vLLM's input processor makes."""
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.process_inputs
    if hasattr(original, PATCHED):
        return

    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        if (edge := _edge_of(self)) is not None:
            edge.admit(request)
        return request

    setattr(process_inputs, PATCHED, True)
    InputProcessor.process_inputs = process_inputs


def _edge_of(processor: Any) -> Any:
    """The edge of an input processor's engine, made once; None if that is not express's."""
    if not hasattr(processor, "express_edge"):
        from .edge import Edge
        from .platforms.common import chosen

        config = processor.vllm_config
        processor.express_edge = Edge.of(config) if chosen(config) else None
    return processor.express_edge


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
            from .server.batch import budgets_in

            wrapped = functools.wraps(original)(budgets_in(original))
            setattr(wrapped, PATCHED, True)
            module.run_request = wrapped  # type: ignore[union-attr]
