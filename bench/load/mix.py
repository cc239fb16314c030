"""What the clients ask for: kinds of requests, their lengths and budgets, and when they arrive."""

from __future__ import annotations

import pydoc_data.topics
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: The longest document of a full-scale mix, in tokens.
LONGEST = 32_768
#: Beyond any limit that an operator sets: such a request must be refused.
GREEDY = 10**9


@dataclass(frozen=True)
class Kind:
    """Prompt and answer lengths in tokens, uniform between their bounds, at scale 1."""

    name: str
    share: float
    prompt: tuple[int, int]
    answer: tuple[int, int]
    instruction: str


KINDS = {
    kind.name: kind
    for kind in (
        Kind("chat", 0.6, (100, 800), (50, 250), "Answer the question at the end of this."),
        Kind("document", 0.25, (8192, 30_720), (100, 400), "Summarise this document."),
        Kind("long", 0.15, (100, 400), (1000, 3000), "Write a long essay about this."),
    )
}


@dataclass(frozen=True)
class Request:
    """One request of the plan: sent at `at` seconds, whatever the server does."""

    at: float
    kind: str
    prompt: str
    answer_tokens: int
    budget: dict[str, Any]

    @property
    def greedy(self) -> bool:
        return self.budget.get("memory_tokens") == GREEDY


def plan(
    *,
    requests: int,
    rate: float,
    kinds: Sequence[str],
    budgets: Sequence[dict[str, Any]],
    greedy: float,
    scale: float,
    chars_per_token: float,
    seed: int,
) -> list[Request]:
    """The whole load: the same for the same arguments, whichever server it is sent to."""
    draw = random.Random(seed)
    source = text()
    chosen = [KINDS[name] for name in kinds]
    weights = [kind.share for kind in chosen]
    at, result = 0.0, []
    for _ in range(requests):
        at += draw.expovariate(rate)
        kind = draw.choices(chosen, weights)[0]
        tokens = max(16, round(scale * draw.randint(*kind.prompt)))
        budget = draw.choice(budgets)
        if draw.random() < greedy:
            budget = {"memory_tokens": GREEDY}
        result.append(
            Request(
                at,
                kind.name,
                f"{kind.instruction}\n\n{passage(source, tokens, chars_per_token, draw)}",
                max(4, round(scale * draw.randint(*kind.answer))),
                budget,
            )
        )
    return result


def text() -> str:
    """The Python language reference, which every Python has."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def passage(source: str, tokens: int, chars_per_token: float, draw: random.Random) -> str:
    """Real text of about `tokens` tokens, from a place of its own."""
    length = min(len(source), round(tokens * chars_per_token))
    start = draw.randrange(len(source) - length + 1)
    return source[start : start + length]


def exact(request: Request) -> Request:
    """The same request without a budget: every token is kept."""
    if request.greedy:
        return request
    return Request(
        request.at, request.kind, request.prompt, request.answer_tokens, {"mode": "exact"}
    )
