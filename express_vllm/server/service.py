"""`Service`: what the routes ask; one per API server process, over vLLM's application state."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, SkipValidation, create_model

from ..budget import resolve
from ..edge import current
from ..fields import BudgetError, Fields
from ..settings import Settings
from .answer import with_usage
from .body import OBJECT, PREFIX, budget, check_duplicates, refuse_beam_search, refuse_system
from .errors import refused
from .front import follow
from .metrics import attach_metrics, read_gauges
from .plan import Capacity, Plan, describe_server, plan
from .settle import settled
from .stored import Responses
from .table import Route
from .watch import RECENT, Call, watch

#: The most that a length may say; what the model allows is checked with the budget.
MOST = 2**53


class PlanRequest(BaseModel):
    """A request to plan: lengths in tokens and a budget."""

    model_config = ConfigDict(extra="forbid")

    prompt_tokens: int = Field(ge=1, le=MOST, strict=True, description="length of the prompt")
    max_tokens: int = Field(16, ge=1, le=MOST, strict=True, description="most tokens to generate")


class Service:
    """Reads vLLM's state once and watches its engine from then on."""

    def __init__(self, state: Any) -> None:
        self.vllm_config = config = state.vllm_config
        self.settings = Settings.of(config)
        self.fields: type[Fields] = self.settings.fields
        # Its type is for the schema; `budget` checks it, with better errors.
        express: Any = Annotated[self.fields | None, SkipValidation]
        text = "what the request's KV cache may use (docs/api.md)"
        self.plan_request = create_model(
            "ExpressPlanRequest", __base__=PlanRequest,
            express=(express, Field(None, description=text)),
        )  # fmt: skip
        self.recent: deque[Call] = deque(maxlen=RECENT)
        watch(state.engine_client)
        if (online := getattr(state, "online_renderer", None)) is not None:
            follow(online.renderer)
        serving = getattr(state, "openai_serving_responses", None)
        self.responses = None if serving is None else Responses(serving)
        attach_metrics(state.engine_client, config)

    @property
    def capacity(self) -> Capacity:
        parallel, cache = self.vllm_config.parallel_config, self.vllm_config.cache_config
        engines = parallel.data_parallel_size
        # Every engine keeps one block for itself.
        blocks = max((cache.num_gpu_blocks or 0) - engines, 0)
        limit = self.vllm_config.scheduler_config.max_num_seqs * engines
        return Capacity(blocks, cache.block_size, limit, self.settings.layers)

    def call(self, route: Route, body: Any, text: bytes) -> Call:
        """A request of the route with this body.  Raises BudgetError."""
        refuse_beam_search(body)
        if isinstance(body, dict) and OBJECT in body:
            check_duplicates(text)
        prefix, fields = budget(body, self.fields)
        refuse_system(route, prefix, fields)
        return Call(route.path, self.settings.size, prefix, fields, self.recent)

    async def answer(self, call: Call, handle: Callable[[], Awaitable[Response]]) -> Response:
        """What `handle` answers, with usage; a refusal is raised, whatever it makes of that."""
        # Never reset: a stream asks for its output later, and every request has a context of its
        # own.
        current.set(call)
        try:
            response = await handle()
            if not call.asked.is_set():
                await self._begin(call, response)
            if call.error is not None:
                raise call.error
        except BaseException:
            call.finish()
            if self.responses is not None:
                self.responses.forget(call)
            raise
        return with_usage(response, call.usage, call.finish)

    async def _begin(self, call: Call, response: Response) -> None:
        """Wait for the engine's word on what the answer has not asked it for yet."""
        if isinstance(response, StreamingResponse):
            response.body_iterator = await settled(aiter(response.body_iterator), call)
        elif self.responses is not None and call.route == "/v1/responses":
            await self.responses.begun(response, call)

    def describe(self) -> dict[str, Any]:
        return describe_server(self.settings, self.capacity, self.fields)

    def plan(self, request: Any, body: bytes) -> Plan:
        """The plan of a request.  Raises vLLM's validation error (400)."""
        settings, length = self.settings, request.prompt_tokens + request.max_tokens
        try:
            check_duplicates(body)
            if length > settings.max_model_len:
                raise BudgetError(
                    "prompt_tokens", request.prompt_tokens,
                    f"with max_tokens={request.max_tokens} it is {length}, and the model's "
                    f"maximal length is {settings.max_model_len}", "length",
                )  # fmt: skip
            _, fields = budget({OBJECT: request.express}, self.fields)
            found = resolve(
                fields, settings, prompt_tokens=request.prompt_tokens,
                max_tokens=request.max_tokens, prefix=PREFIX,
            )  # fmt: skip
        except BudgetError as error:
            raise refused(error) from error
        return plan(found, settings, self.capacity, request.prompt_tokens, request.max_tokens)

    def status(self) -> dict[str, Any]:
        """What the engines hold now, and the last requests of this API server, newest first."""
        capacity, size = self.capacity, self.settings.size
        return {
            **read_gauges(),
            "kv_tokens": capacity.tokens(size),
            "block_size": capacity.block_size,
            "bytes_per_token": size.bytes_per_token,
            "model": self.vllm_config.model_config.served_model_name,
            "requests": [call.row() for call in reversed(self.recent)],
        }
