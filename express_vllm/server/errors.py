"""Refusals as vLLM reports them: HTTP 400 in OpenAI's form, counted by reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..fields import BudgetError

#: Called with the reason of every refusal; set while a server's metrics exist.
_listeners: list[Callable[[str], None]] = []


def refused(error: BudgetError) -> Any:
    """The exception that vLLM turns into a 400 naming field and value; counts the refusal."""
    from vllm.exceptions import VLLMValidationError

    for listen in _listeners:
        listen(error.reason)
    return VLLMValidationError(str(error), parameter=error.field)


def on_refusal(listener: Callable[[str], None]) -> None:
    """Tell `listener`, and nobody else, about refusals."""
    _listeners[:] = [listener]
