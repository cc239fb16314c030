"""The `express` object of a request body, read strictly: a key that is given twice is an error."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import Field, SkipValidation

from ..fields import PREFIX as XARGS
from ..fields import BudgetError, Fields, parse

OBJECT = "express"
PREFIX = "express."


def express_field(model: type[Fields]) -> tuple[Any, Any]:
    """The `express` field of a request model, for `pydantic.create_model`.

    `model` gives its schema; `merge` checks it with the same model, for better errors.
    """
    field = Field(None, description="what the request's KV cache may use (docs/api.md)")
    return Annotated[model | None, SkipValidation], field


class _Object(dict):
    """A JSON object that remembers a key that it was given twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.twice: str | None = None
        if len(self) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    self.twice = key
                seen.add(key)


def check_duplicates(body: bytes) -> None:
    """Raise BudgetError if `express`, or a key inside it, is given twice in the body."""
    whole = json.loads(body, object_pairs_hook=_Object)
    if not isinstance(whole, _Object):
        return
    if whole.twice == OBJECT:
        raise BudgetError(OBJECT, "...", "it is given twice; give it once", "duplicate")
    inner = whole.get(OBJECT)
    if isinstance(inner, _Object) and inner.twice is not None:
        raise BudgetError(
            PREFIX + inner.twice, inner[inner.twice], "it is given twice; give it once", "duplicate"
        )


def merge(raw: object, xargs: dict[str, Any] | None, model: type[Fields]) -> dict[str, Any]:
    """`vllm_xargs` with the `express` object in it.  Raises BudgetError if both name a budget."""
    fields = parse(raw, model, PREFIX)
    rivals = sorted(name for name in xargs or {} if name.startswith(XARGS))
    if rivals:
        raise BudgetError(
            OBJECT, raw,
            f"vllm_xargs has {', '.join(rivals)} too; name the budget in one of the two",
            "conflict",
        )  # fmt: skip
    return {**(xargs or {}), **fields.xargs()}
