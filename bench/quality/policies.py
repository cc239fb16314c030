"""A policy: a method and a number of peak slots.  `NAME` or `NAME:FIELD=VALUE,FIELD=VALUE` names
the method, one of `methods.METHODS`, and sets fields of its class.

A size may be a share of the slots: heavy=0.25.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from express_vllm.shape import Shape

from .harness import Heads, LayerCache
from .methods import METHODS, Method

#: What the server does.
DEFAULT = "express:wide=auto"
#: What is measured unless told otherwise.
USUAL = (*(name for name in METHODS if name != "mixed"), DEFAULT)


def _size(text: str, slots: int) -> int:
    return round(float(text) * slots) if "." in text else int(text)


#: A field's type -> what makes a value of its text and the policy's slots.
_VALUES: dict[str, Callable[[str, int], Any]] = {
    "Size": _size,
    "int": lambda text, slots: int(text),
    "float": lambda text, slots: float(text),
    "bool": lambda text, slots: int(text),
    "str": lambda text, slots: text,
}


@dataclass(frozen=True)
class Policy:
    """A method that keeps at most `slots` slots a layer, the mean over layers."""

    label: str
    slots: int
    method: Method

    @classmethod
    def parse(cls, text: str, slots: int) -> Policy:
        name, _, rest = text.partition(":")
        if name not in METHODS:
            raise ValueError(f"policy {name!r} is not one of {', '.join(METHODS)}")
        kinds = {f.name: str(f.type).removesuffix(" | None") for f in fields(METHODS[name])}
        values: dict[str, Any] = {}
        for part in filter(None, rest.split(",")):
            key, _, value = part.partition("=")
            if key not in kinds:
                raise ValueError(f"policy {name!r} has no option {key!r}: {', '.join(kinds)}")
            values[key] = _VALUES[kinds[key]](value, slots)
        options = ",".join(f"{key}={value}" for key, value in values.items())
        return cls(f"{name}:{options}" if options else name, slots, METHODS[name](**values))

    @property
    def name(self) -> str:
        return self.method.name

    def shape(self) -> Shape:
        return self.method.shape(self.slots)

    def caches(self, heads: Heads, seed: int = 0) -> list[LayerCache]:
        """One per layer; layers of one size share their plans."""
        return self.method.caches(heads, self.slots, seed)

    def layer_slots(self, heads: Heads) -> list[int]:
        return self.method.layer_slots(heads, self.slots)


def every(words: Sequence[str], slots: Sequence[int]) -> list[Policy]:
    """Exact once, if it is among the words, then the others with every number of slots."""
    found = [Policy.parse("exact", 0)] if "exact" in words else []
    return found + [Policy.parse(w, n) for n in slots for w in words if w != "exact"]


def title(label: str) -> str:
    """What tables call a policy of this label."""
    if label == DEFAULT:
        return "express (default)"
    if label == "express":
        return "express, equal layers"
    name, _, options = label.partition(":")
    words = options.replace("wide=auto", "wide layers").replace(",", ", ")
    return METHODS[name].title + (f", {words}" if words else "")


def place(label: str) -> tuple[bool, int, bool]:
    """Sorts labels: the default, then as METHODS has them, exact and what is none of them last."""
    name, _, options = label.partition(":")
    names = [*METHODS][1:]
    return label != DEFAULT, names.index(name) if name in names else len(names), bool(options)
