"""What the sweep of defaults tries: one change from the default at a time, and tuned peers."""

from __future__ import annotations

from collections.abc import Sequence

from . import nll
from .harness import Heads
from .policies import DEFAULT, Policy
from .run import Result, Rows, Run

FILE = "quality/sweep"
SPLIT = "choose"
BATCH = 64

#: Axis -> policies.  `default` is part of every axis.
AXES = {
    "schedule": ("paper", "uniform", "uniform:schedule=paper", "express:profile=even"),
    "kernel": ("express:kernel=exponential", "express:kernel=uniform",
               "express:schedule=paper,kernel=gaussian"),
    "sinks": tuple(f"express:sinks={n}" for n in (0, 1, 8, 16, 32)),
    "window": tuple(f"express:window={x}" for x in ("0.0625", "0.125", "0.375", "0.5")),
    "heavy": tuple(f"express:heavy={x}" for x in ("0", "0.0625", "0.25", "0.375")),
    "group": tuple(f"express:group={n}" for n in (8, 16, 32, 128, 256)),
    "exponent": tuple(f"express:exponent={x}" for x in (0, 0.5, 0.65, 0.75, 0.85, 0.9)),
    "interval": tuple(f"express:interval={n}" for n in (32, 64, 128, 256, 512)),
    # Less noise from weights leaves room for more tokens that are kept exactly.
    "shrunk": tuple(f"express:exponent={e},heavy={h}{w}" for e, h, w in (
        (0.75, 0.25, ""), (0.75, 0.375, ""), (0.5, 0.25, ""), (0.85, 0.25, ""),
        (0.75, 0.25, ",window=0.375"), (0.75, 0.25, ",window=0.125"), (0.75, 0.25, ",window=0.5"),
        (0.75, 0.25, ",interval=0.0625"), (0.75, 0.25, ",interval=0.25"), (0.75, 0.25, ",group=16"),
        (0.75, 0.25, ",profile=even"), (0.65, 0.25, ""), (0.5, 0.375, ""), (0.25, 0.25, ""),
        (0.75, 0.5, ",window=0.125"), (0.75, 0.375, ",window=0.125"))),
    # Which layers want more slots than the others: each of the model's, one at a time, at equal
    # memory (`of_axis`); then the best of SmolLM2-135M together.
    "layers": (),
    "wide": (DEFAULT, *(f"express:wide={w}" for w in (
        "18", "20", "18/20", "18/23", "17/18/20/23", "17/18/20/23/24",
        "18,factor=8", "18/20,factor=8", "18/20/23,factor=8", "18,factor=2", "18/20/23,factor=2",
        "17/18/20/23/24,factor=2"))),
    "peers": ("streaming", "snapkv", "snapkv:recent=0.25", "snapkv:recent=0.5", "h2o",
              "h2o:recent=0.25", "expected", "expected:recent=0.5", "keydiff", "keydiff:recent=0.5",
              "knorm", "knorm:recent=0.5", "random"),
}  # fmt: skip
FULL = {"slots": [512, 1024, 2048], "length": 8192, "first": 2048, "axes": list(AXES)}
SMALL = {"slots": [512], "length": 3072, "first": 1024, "documents": 2,
         "axes": ["schedule", "heavy"]}  # fmt: skip


def measure(run: Run) -> Result:
    """The policies of the axes, or those that the command names."""
    options = run.options
    axes = [] if options.policies else options.axes
    rows: Rows = []
    for slots in options.slots:
        named = [Policy.parse(word, slots) for word in options.policies or ()]
        rows += nll.losses(run, named or policies(slots, axes, options.device, run.heads))
    return rows, {"axes": axes}


def single_layer(layer: int) -> str:
    return f"express:wide={layer},factor=2"


def of_axis(axis: str, layers: int) -> tuple[str, ...]:
    """What an axis tries on a model of so many layers."""
    return tuple(map(single_layer, range(layers))) if axis == "layers" else AXES[axis]


def policies(slots: int, axes: Sequence[str], device: str, heads: Heads) -> list[Policy]:
    """The distinct policies of some axes that fit; a kernel that the device lacks is left out."""
    found: dict[str, Policy] = {}
    for text in ("exact", "express", *(t for axis in axes for t in of_axis(axis, heads.layers))):
        if device != "cpu" and text.startswith("express:kernel="):
            continue
        policy = Policy.parse(text, slots)
        try:
            policy.shape()
            policy.layer_slots(heads)
        except ValueError:
            continue  # no room for a coreset, or no such layer: not a choice here
        found.setdefault(policy.label, policy)
    return list(found.values())
