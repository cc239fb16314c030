"""`Fields`: what a request may say about its cache; the only source of names, types and limits.

The same model validates `vllm_xargs` (as `express_<field>`), the `express` object of a request
body and `POST /v1/express/plan`, and is what the served OpenAPI schema shows.  `limited` narrows
it to the operator's limits.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from .shape import MAX_TOKENS, MIN_SLOTS

PREFIX = "express_"
MAX_SEED = 2**63 - 1
MODES = ("express", "exact")
#: A share of what exact attention would hold, or a size in bytes.
MEMORY = re.compile(r"(?P<number>[0-9]{1,15}(?:\.[0-9]{1,9})?) ?(?P<unit>%|[KMGT]i?B|B)")
UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
#: The longest piece of a refused value, and of a refused name, that an error repeats.
SHOWN, SHOWN_NAME = 120, 64


class BudgetError(ValueError):
    """A budget that is refused: `field`, `value` and what is `allowed`.

    `field` is safe to print: cut if it is long, and without control characters.  `reason` is one
    of a few short words, for metrics.
    """

    def __init__(self, field: str, value: object, allowed: str, reason: str = "") -> None:
        self.field, self.value, self.allowed = shown_name(field), value, allowed
        self.reason = reason or re.sub(r"^express[_.]", "", self.field)
        super().__init__(f"{self.field}={self.shown} is not allowed: {allowed}")

    @property
    def shown(self) -> str:
        """The value as Python writes it, cut if it is long."""
        try:
            text = repr(self.value)
        except ValueError:  # an integer of more digits than Python will write
            text = f"<an integer of {self.value.bit_length()} bits>"  # type: ignore[attr-defined]
        except RecursionError:
            text = f"<a {type(self.value).__name__} nested too deep>"
        return _cut(text, len(text), SHOWN)


def needs_integer(prefix: str) -> BudgetError:
    """The refusal of `"pinned_tokens": "system"` where no chat route has made a number of it."""
    return BudgetError(
        f"{prefix}pinned_tokens", "system",
        "it must be an integer here; 'system' is for the express object of /v1/chat/completions, "
        "/v1/responses and /v1/messages",
    )  # fmt: skip


def shown_name(name: str) -> str:
    """A name that a client chose, fit for messages and log lines: ASCII, one line, cut."""
    return _cut(ascii(name[: SHOWN_NAME + 1])[1:-1], len(name), SHOWN_NAME)


def _cut(text: str, length: int, most: int) -> str:
    """`text`, which stands for `length` characters, within `most` of them."""
    return text if max(len(text), length) <= most else f"{text[:most]}... ({length} characters)"


class Fields(BaseModel):
    """What a request may use.  Everything is optional; the server's defaults fill the rest."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    memory_tokens: int | None = Field(
        None, ge=MIN_SLOTS,
        description="most memory that the request's cache may ever take: what exact attention "
        "takes for so many tokens",
    )  # fmt: skip
    memory: str | None = Field(
        None, pattern=f"^{MEMORY.pattern.replace('?P<number>', '').replace('?P<unit>', '')}$",
        max_length=32, examples=["10%", "256MiB"],
        description="the same as a share of what exact attention would hold for the request's "
        "maximal length ('10%'), or in bytes ('256MiB')",
    )  # fmt: skip
    compute_tokens: int | None = Field(
        None, ge=MIN_SLOTS,
        description="most entries that one token may attend to, the mean over layers; at most the "
        "memory",
    )  # fmt: skip
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="seed of the compression's random choices"
    )
    mode: Literal["express", "exact"] | None = Field(
        None, description="'express' (bounded) or 'exact' (every token is kept)"
    )
    profile: Literal["recent", "even"] | None = Field(
        None, description="'recent' keeps recent tokens dense, 'even' favours old ones"
    )

    pinned_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | Literal["system"] | None = Field(
        None,
        description="first tokens of the prompt that are kept exactly for as long as the request "
        "lives; 'system', on chat routes, pins the system messages and tools at its front",
    )

    def xargs(self) -> dict[str, Any]:
        """The same budget as `vllm_xargs`."""
        return {PREFIX + k: v for k, v in self.model_dump(exclude_none=True).items()}


@lru_cache(maxsize=64)
def limited(least: int, least_memory: int, high: int) -> type[Fields]:
    """`Fields` with limits: `least` of the smallest cache, the operator's for the memory."""
    high = max(least_memory, high)
    changes: dict[str, Any] = {}
    for name, low in (("memory_tokens", least_memory), ("compute_tokens", least)):
        text = Fields.model_fields[name].description
        changes[name] = (int | None, Field(None, ge=low, le=high, description=text))
    return create_model("ExpressFields", __base__=Fields, __doc__=Fields.__doc__, **changes)


def parse(raw: object, model: type[Fields], prefix: str = PREFIX) -> Fields:
    """Check a mapping of bare field names.  Raises BudgetError naming `<prefix><field>`."""
    if not isinstance(raw, Mapping):
        raise BudgetError(prefix.rstrip("._"), raw, "it must be a JSON object", "type")
    for name in raw:  # before the model, which would list every one of a million unknown names
        if name not in Fields.model_fields:
            allowed = unknown(prefix + name, {prefix + known for known in Fields.model_fields})
            raise BudgetError(prefix + name, raw[name], allowed, "unknown_field")
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    name = str(first["loc"][0])
    raise BudgetError(prefix + name, first["input"], describe(model, name, prefix))


def describe(model: type[Fields], name: str, prefix: str = PREFIX, note: str = "") -> str:
    """What the field `name` allows, read from the model's schema."""
    schema = model.model_json_schema()["properties"][name]
    kind, *words = [part for part in schema["anyOf"] if part.get("type") != "null"]
    if "enum" in kind:
        return f"it must be one of {', '.join(kind['enum'])}"
    if name == "memory":
        return (
            "it must be a share such as '10%' or a size such as '256MiB' "
            f"(units: %, {', '.join(UNITS)}); for a number of tokens, did you mean "
            f"{prefix}memory_tokens?"
        )
    allowed = f"it must be an integer from {kind['minimum']}"
    if "maximum" in kind:
        allowed += f" to {kind['maximum']}"
    allowed += "".join(f", or '{word['const']}'" for word in words)
    return f"{allowed} ({note})" if note else allowed


def unknown(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name[:SHOWN_NAME], known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}known fields are {', '.join(sorted(known))}"


def memory_amount(text: str, length: int, bytes_per_token: int) -> tuple[int, bool]:
    """(tokens, whether it is a share) that `text`, which `Fields` has passed, buys.

    A share is of `length`, what exact attention would hold.
    """
    found = MEMORY.fullmatch(text)
    assert found, text
    number, unit = float(found["number"]), found["unit"]
    if unit == "%":
        return int(length * number / 100), True
    return int(number * UNITS[unit] / bytes_per_token), False
