"""Every change to vLLM that has no extension point: one function each, applied when it is needed.

`tests/test_patches.py` holds what they rely on against the installed vLLM.
"""

from __future__ import annotations

import functools
from typing import Any

#: Set on what was put in place of vLLM's own.
PATCHED = "express_patched"


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
