"""Which routes take a budget, and why the others refuse it: one table that decides and documents.

The part of docs/api.md that lists them is `python -m express_vllm.server.table`, a test keeps them
equal.  What is not listed refuses bodies that name a budget, so that none is ever ignored.
"""

from __future__ import annotations

from dataclasses import dataclass

_RENDERS = "it runs nothing; name the budget where the tokens are generated"
_SPEECH = "not tried with speech models"
_DIFFUSION = "its requests are vLLM's own, for diffusion models"
_COHERE = "not tried with Cohere's API"


@dataclass(frozen=True)
class Route:
    """Why a route refuses an `express` object, or budgets in `vllm_xargs`; empty: honoured.

    `system`: its prompt is one conversation, of which the object may pin the system messages.
    """

    path: str
    express: str = ""
    xargs: str = ""
    system: bool = False

    def refuses(self, spelling: str) -> str:
        """Why it refuses this spelling of a budget, or ""."""
        return self.express if spelling == "express" else self.xargs


ROUTES = {
    route.path: route
    for route in (
        Route("/v1/completions"),
        Route("/v1/chat/completions", system=True),
        Route("/v1/responses", system=True),
        Route("/v1/messages", system=True),
        Route("/v1/chat/completions/batch"),
        Route("/invocations"),
        Route("/generative_scoring"),
        Route("/inference/v1/generate"),
        Route("/v1/completions/render", _RENDERS),
        Route("/v1/chat/completions/render", _RENDERS),
        Route("/v1/responses/render", _RENDERS),
        Route("/v1/messages/render", _RENDERS),
        Route("/v1/systemone", _DIFFUSION, _DIFFUSION),
        Route("/v1/audio/transcriptions", _SPEECH, _SPEECH),
        Route("/v1/audio/translations", _SPEECH, _SPEECH),
        Route("/cohere/v2/chat", _COHERE, _COHERE),
        Route("/cohere/v2/chat/render", _COHERE, _COHERE),
    )
}
#: Routes of vLLM's that take a body and generate nothing; a budget means nothing there.
WITHOUT_BUDGET = frozenset({
    "/tokenize", "/detokenize", "/ping", "/scale_elastic_ep", "/is_scaling_elastic_ep",
    "/v1/messages/count_tokens", "/v1/responses/{response_id}/cancel",
    "/v1/completions/derender", "/v1/chat/completions/derender", "/inference/v1/abort_requests",
})  # fmt: skip


def decision(path: str) -> Route:
    """What a route does with budgets."""
    unlisted = "this route takes no budget (docs/api.md lists those that do)"
    return ROUTES.get(path) or Route(path, unlisted, unlisted)


def markdown() -> str:
    """The table as docs/api.md shows it."""
    rows = [
        f"| `POST {route.path}` | {_cell(route.express)} | {_cell(route.xargs)} |"
        for route in ROUTES.values()
    ]
    return "\n".join(["| route | `express` | `vllm_xargs` |", "| --- | --- | --- |", *rows])


def _cell(reason: str) -> str:
    return f"400: {reason}" if reason else "honoured"


if __name__ == "__main__":
    print(markdown())
