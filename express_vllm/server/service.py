"""`Service`: what the routes ask; one per API server process, over vLLM's application state."""

from __future__ import annotations

import time
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from ..budget import Budget, BudgetError, resolve
from ..kvsize import KVSize
from ..platforms.common import server_config
from .body import PREFIX, check_duplicates, express_field, merge
from .errors import refused
from .metrics import attach_metrics, read_gauges
from .plan import Capacity, Plan, describe_server, plan
from .watch import Call, WatchedEngine

#: vLLM's handlers that ask the engine for completions.
HANDLERS = ("openai_serving_completion", "openai_serving_chat", "openai_serving_responses")


class PlanRequest(BaseModel):
    """A request to plan: lengths in tokens and a budget."""

    model_config = ConfigDict(extra="forbid")

    prompt_tokens: int = Field(ge=1, strict=True, description="length of the prompt")
    max_tokens: int = Field(16, ge=1, strict=True, description="most tokens to generate")


class Service:
    """Reads vLLM's state once and watches its handlers from then on."""

    def __init__(self, state: Any) -> None:
        self.vllm_config = config = state.vllm_config
        self.config = server_config(config)
        self.size = KVSize.of(config, self.config)
        self.max_model_len: int = config.model_config.max_model_len
        self.fields = self.config.fields(self.max_model_len)
        self.plan_request = create_model(
            "ExpressPlanRequest", __base__=PlanRequest, express=express_field(self.fields)
        )
        self.engine = WatchedEngine(state.engine_client, self.budget)
        for name in HANDLERS:
            if (handler := getattr(state, name, None)) is not None:
                handler.engine_client = self.engine
        attach_metrics(state.engine_client, config)

    @property
    def capacity(self) -> Capacity:
        parallel, cache = self.vllm_config.parallel_config, self.vllm_config.cache_config
        engines = parallel.data_parallel_size
        # Every engine keeps one block for itself.
        blocks = max((cache.num_gpu_blocks or 0) - engines, 0)
        limit = self.vllm_config.scheduler_config.max_num_seqs * engines
        return Capacity(blocks, cache.block_size, limit)

    def budget(self, sampling_params: Any, tokens: int, prefix: str) -> Budget:
        """The budget of sampling parameters, as the engine will resolve it."""
        return self._resolve(sampling_params.extra_args, tokens, sampling_params.max_tokens, prefix)

    def _resolve(
        self, extra_args: Any, prompt_tokens: int, max_tokens: int | None, prefix: str
    ) -> Budget:
        return resolve(
            extra_args, self.config, prompt_tokens=prompt_tokens, max_tokens=max_tokens,
            max_model_len=self.max_model_len, slot_bytes=self.size.slot_bytes, prefix=prefix,
        )  # fmt: skip

    def finish(self, call: Call) -> None:
        """The HTTP answer of `call` is complete."""
        call.finished = call.finished or time.time()

    def refuse_beam_search(self, raw: object) -> None:
        raise BudgetError(
            "express", raw, "beam search runs its own requests without it; drop use_beam_search",
            "beam_search",
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        return describe_server(
            self.config, self.size, self.capacity, self.max_model_len, self.fields
        )

    def plan(self, request: Any, body: bytes) -> Plan:
        """The plan of a request.  Raises vLLM's validation error (400)."""
        try:
            check_duplicates(body)
            length = request.prompt_tokens + request.max_tokens
            if length > self.max_model_len:
                raise BudgetError(
                    "prompt_tokens", request.prompt_tokens,
                    f"with max_tokens={request.max_tokens} it is {length}, and the model's "
                    f"maximal length is {self.max_model_len}", "length",
                )  # fmt: skip
            raw = {} if request.express is None else request.express
            budget = self._resolve(
                merge(raw, None, self.fields), request.prompt_tokens, request.max_tokens, PREFIX
            )
        except BudgetError as error:
            raise refused(error) from error
        return plan(
            budget, self.config, self.size, self.capacity,
            request.prompt_tokens, request.max_tokens,
        )  # fmt: skip

    def status(self) -> dict[str, Any]:
        """What the engines hold now, and the last requests of this API server, newest first."""
        capacity = self.capacity
        return {
            **read_gauges(),
            "kv_slots": capacity.blocks * capacity.block_size,
            "block_size": capacity.block_size,
            "bytes_per_token": self.size.slot_bytes,
            "model": self.vllm_config.model_config.served_model_name,
            "requests": [call.row() for call in reversed(self.engine.recent)],
        }
