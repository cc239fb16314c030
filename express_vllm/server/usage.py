"""`usage.express`: what a request's cache held, from its budget and its lengths alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field

from ..budget import Budget
from ..kvsize import KVSize


@dataclass
class Sequence:
    """A sequence of `prompt` plus `output` tokens under a budget, `cached` of which it found."""

    budget: Budget
    prompt: int
    output: int = 0
    cached: int = 0
    done: bool = False

    @property
    def stored(self) -> int:
        """Tokens whose keys and values were computed: the last one that is sampled never is."""
        return self.prompt + max(self.output - 1, 0)

    @property
    def compactions(self) -> int:
        """What was done for this sequence; others did those of the tokens that it found."""
        return self.budget.compactions(self.stored) - self.budget.compactions(self.cached)


class Usage(BaseModel):
    """`usage.express` of an answer.  Memory is in tokens of exact attention (kvsize.py).

    With several sequences (`n`, several prompts) peaks and compactions are their sums, and the
    memory is that of one of them.
    """

    mode: str
    memory_tokens: int = Field(description="the budget of each sequence, as it was granted")
    pinned_tokens: int = Field(
        description="the first tokens of each sequence that nothing thins; all, where all are kept"
    )
    peak_kv_tokens: int = Field(description="the most memory that was reserved")
    exact_kv_tokens: int = Field(description="the memory that exact attention would have taken")
    compactions: int
    compression_ratio: float = Field(description="exact_kv_tokens / peak_kv_tokens")
    sequences: int


def usage(sequences: list[Sequence], size: KVSize) -> dict[str, Any]:
    """The `Usage` of the sequences of one call, as a dictionary."""
    peak = sum(size.tokens(s.budget.reserved(s.stored)) for s in sequences)
    exact = sum(s.stored for s in sequences)
    return Usage(
        mode=sequences[0].budget.mode,
        memory_tokens=max(s.budget.memory_tokens for s in sequences),
        pinned_tokens=min(s.budget.pinned(s.stored) for s in sequences),
        peak_kv_tokens=peak,
        exact_kv_tokens=exact,
        compactions=sum(s.compactions for s in sequences),
        compression_ratio=round(exact / peak, 4) if peak else 1.0,
        sequences=len(sequences),
    ).model_dump()
