"""One streamed chat completion, timed: the OpenAI client, the budget in `extra_body`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import httpx
import openai

from .mix import Request

SAMPLE = 4000


@dataclass
class Outcome:
    """What became of a request; times in seconds, `sent` since the start of the load."""

    kind: str
    sent: float
    #: "finished", "refused" (a 400), "turned away" (429 or 503) or "failed"
    status: str = "failed"
    error: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    first_token_s: float | None = None
    total_s: float = 0.0
    #: What the server says about the request's cache, if it says anything.
    express: dict[str, Any] | None = None

    @property
    def token_s(self) -> float | None:
        """Mean seconds of a token after the first."""
        if self.first_token_s is None or self.answer_tokens < 2:
            return None
        return (self.total_s - self.first_token_s) / (self.answer_tokens - 1)


class Client:
    """Sends requests to one server."""

    def __init__(self, url: str, model: str, style: str, key: str, timeout: float) -> None:
        self.url, self.model, self.style = url, model, style
        self.openai = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key=key, timeout=timeout, max_retries=0
        )

    def extra(self, budget: dict[str, Any]) -> dict[str, Any]:
        """The budget as the server takes it: an object of its own, or vLLM's own extra field."""
        if not budget:
            return {}
        if self.style == "express":
            return {"express": budget}
        return {"vllm_xargs": {f"express_{name}": value for name, value in budget.items()}}

    async def send(self, request: Request, sent: float) -> Outcome:
        outcome = Outcome(request.kind, sent)
        start = time.perf_counter()
        try:
            await self._stream(request, outcome, start)
            outcome.status = "finished"
        except openai.BadRequestError as error:
            outcome.status, outcome.error = "refused", str(error)[:300]
        except openai.APIStatusError as error:
            turned_away = error.status_code in (429, 503)
            outcome.status = "turned away" if turned_away else "failed"
            outcome.error = f"{error.status_code}: {str(error)[:300]}"
        except Exception as error:  # whatever breaks one request, the load goes on
            # A server that has begun to stream says in an event what else would be its status.
            refused = str(getattr(error, "code", None)) == "400"
            outcome.status = "refused" if refused else "failed"
            outcome.error = f"{type(error).__name__}: {str(error)[:300]}"
        outcome.total_s = time.perf_counter() - start
        return outcome

    async def _stream(self, request: Request, outcome: Outcome, start: float) -> None:
        stream = await self.openai.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": request.prompt}],
            max_tokens=request.answer_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            # Answers of the planned length, so that two runs do the same work.
            extra_body={"ignore_eos": True, **self.extra(request.budget)},
        )
        async for chunk in stream:
            if chunk.choices and outcome.first_token_s is None and chunk.choices[0].delta.content:
                outcome.first_token_s = time.perf_counter() - start
            if chunk.usage:
                outcome.prompt_tokens = chunk.usage.prompt_tokens
                outcome.answer_tokens = chunk.usage.completion_tokens
                outcome.express = (chunk.usage.model_extra or {}).get("express")

    async def close(self) -> None:
        await self.openai.close()


async def find_model(url: str, key: str) -> tuple[str, int]:
    """The first model's name and its maximal length."""
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {key}"}) as http:
        answer = await http.get(f"{url}/v1/models")
        answer.raise_for_status()
    model = answer.json()["data"][0]
    return model["id"], model.get("max_model_len") or 1 << 30


async def find_style(url: str, key: str) -> str:
    """`express` if the server takes the object, else `vllm_xargs`."""
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {key}"}) as http:
        answer = await http.get(f"{url}/v1/express/config")
    return "express" if answer.status_code == 200 else "vllm_xargs"


async def chars_per_token(client: Client, text: str) -> float:
    """Measured with a request that also warms the server up."""
    answer = await client.openai.chat.completions.create(
        model=client.model, messages=[{"role": "user", "content": text[:SAMPLE]}], max_tokens=8
    )
    assert answer.usage is not None
    return SAMPLE / answer.usage.prompt_tokens
