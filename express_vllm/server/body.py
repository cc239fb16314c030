"""The budget that a request body names, read strictly: in one place, and every key once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from ..fields import PREFIX as XARGS
from ..fields import BudgetError, Fields, needs_integer, parse, shown_name
from .table import Route

OBJECT = "express"
PREFIX = "express."
BEAM_SEARCH = "use_beam_search"
PINNED = XARGS + "pinned_tokens"
#: Where vLLM's bodies may have the other spelling; the second is that of /inference/v1/generate.
XARGS_PLACES = (("vllm_xargs",), ("sampling_params", "extra_args"))


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


def named(body: object) -> Iterator[tuple[str, str, Any]]:
    """Every place of the body that names a budget: (its name, how it spells fields, the fields)."""
    if not isinstance(body, Mapping):
        return
    if body.get(OBJECT) is not None:
        yield OBJECT, PREFIX, body[OBJECT]
    for path in XARGS_PLACES:
        place: Any = body
        for key in path:
            place = place.get(key) if isinstance(place, Mapping) else None
        if isinstance(place, str):  # in a form
            with suppress(ValueError, RecursionError):
                place = json.loads(place)
        if isinstance(place, Mapping):
            fields = {k.removeprefix(XARGS): v for k, v in place.items() if k.startswith(XARGS)}
            if fields:
                yield ".".join(path), XARGS, fields


def budget(body: object, model: type[Fields]) -> tuple[str, dict[str, Any]]:
    """(how the body spells fields, the budget that it names as `vllm_xargs`).

    Raises BudgetError if a field is wrong or two places name a budget.
    """
    places = list(named(body))
    if len(places) > 1:
        (first, _, raw), (other, prefix, fields) = places[:2]
        raise BudgetError(
            first, raw,
            f"{other} has {shown_name(prefix + min(fields))} too; name the budget in one place",
            "conflict",
        )  # fmt: skip
    for _, prefix, raw in places:
        return prefix, parse(raw, model, prefix).xargs()
    return XARGS, {}


def refuse_system(route: Route, prefix: str, fields: Mapping[str, Any]) -> None:
    """Raise BudgetError if the budget, spelled with `prefix`, pins `system` where that is not
    counted."""
    if fields.get(PINNED) == "system" and not (route.system and prefix == PREFIX):
        raise needs_integer(prefix)


def refuse_beam_search(body: object) -> None:
    """Raise BudgetError if the body asks for beam search, with a budget or without."""
    asked = body.get(BEAM_SEARCH) if isinstance(body, Mapping) else None
    if asked is not None and asked is not False:
        raise BudgetError(
            BEAM_SEARCH, asked,
            "it must be false: beam search computes the whole prompt again for every token, in "
            "requests of its own that carry no budget",
            "beam_search",
        )  # fmt: skip
