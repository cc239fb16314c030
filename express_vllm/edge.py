"""The edge: where a request's budget is decided, once, before it goes to the engine.

Every request, of any HTTP route, of a batch or offline, passes vLLM's
`InputProcessor.process_inputs`, which settles its lengths; `patches.resolve_at_the_edge` has
`admit` called on what that returns.  The decision travels in the request's `extra_args`, and
the engine's scheduler only reads it (`granted`).

vLLM's documented hook there, `Platform.validate_request`, is not told for which engine a request is
(a process may have several), sees prompt embeddings before they have a length, and must not change
the parameters, which may be the caller's own.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

from .budget import PREFIX, Budget, BudgetError, resolve, unpack
from .server.errors import refused
from .settings import Settings

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.request import Request

#: The one `express_` key of a request that was admitted, instead of those that its user gave.
GRANTED = PREFIX + "granted"


class Listener(Protocol):
    """Hears of the requests that it has made, and says how its errors spell fields."""

    prefix: str

    def admitted(
        self, request_id: str, budget: Budget, prompt_tokens: int, sequences: int
    ) -> None: ...


#: Whose requests these are: set by an HTTP route for all that it calls.
current: ContextVar[Listener | None] = ContextVar("express_listener", default=None)


def admit(request: EngineCoreRequest, settings: Settings) -> None:
    """Decide the request's budget and write it into its parameters, which are its own.

    Raises vLLM's validation error (HTTP 400).
    """
    from vllm.utils import length_from_prompt_token_ids_or_embeds

    params, listener = request.sampling_params, current.get()
    if params is None:  # pooling, which is refused at start-up
        return
    prefix = listener.prefix if listener else PREFIX
    tokens = length_from_prompt_token_ids_or_embeds(request.prompt_token_ids, request.prompt_embeds)
    given = params.extra_args or {}
    try:
        if request.resumable:
            raise BudgetError(
                "prompt", "a stream of inputs", "the first piece would decide the budget of all; "
                "send the whole prompt in one request", "type",
            )  # fmt: skip
        budget = resolve(
            given, settings, prompt_tokens=tokens, max_tokens=params.max_tokens, prefix=prefix
        )
    except BudgetError as error:
        raise refused(error) from error
    others = {k: v for k, v in given.items() if not str(k).startswith(PREFIX)}
    params.extra_args = {**others, GRANTED: budget.packed}
    if listener:
        listener.admitted(request.request_id, budget, tokens, params.n)


def granted(request: Request, settings: Settings) -> Budget:
    """The budget that the edge gave to a request.  Raises ValueError if it has none."""
    params = request.sampling_params
    packed = (params.extra_args or {}).get(GRANTED) if params is not None else None
    length = request.num_prompt_tokens + request.max_tokens
    try:
        return unpack(packed, settings, length)
    except TypeError as error:
        raise ValueError(f"its budget {packed} is not readable") from error
