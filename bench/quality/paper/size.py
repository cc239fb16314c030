"""Accuracy against the cache's size in long decoding.

The NLL of a long continuation after a short prompt, teacher-forced: every cache's events are at
fixed positions, so that what a token attends to is what it would have in decoding.  With a file of
questions, whether greedy answers are right.
"""

from __future__ import annotations

from .. import nll
from ..policies import Policy
from ..run import Result, Rows, Run
from . import questions

#: Budgets as parts of the length.
SHARES = (8, 4, 2)
FILE = "paper/size"
SPLIT = "report"
BATCH = 16
POLICIES = ["express", "paper", "streaming", "snapkv", "h2o"]
FULL = {"length": 8192, "first": 512, "policies": POLICIES, "questions": 50, "answer": 512}
SMALL = {"length": 768, "first": 96, "policies": POLICIES, "documents": 2, "questions": 2,
         "answer": 32}  # fmt: skip


def measure(run: Run) -> Result:
    slots = budgets(run, run.options.length)
    rows = accuracy(run, slots)
    if run.options.data:
        # Answers are shorter than documents: their budgets are parts of the longest one.
        asked = questions.cases(run)
        longest = max(len(case.prompt) for case in asked) + run.options.answer
        rows += questions.measure(run, asked, policies(run, budgets(run, longest)))
    return rows, {"slots": slots, "first": run.options.first}


def budgets(run: Run, length: int) -> list[int]:
    """The command's slots, or an eighth, a quarter and half of `length`, where a cache fits."""
    if run.options.slots:
        return run.options.slots
    return [n for n in (length // part for part in SHARES) if fits("express", n)]


def fits(name: str, slots: int) -> bool:
    try:
        Policy.parse(name, slots).shape()
    except ValueError:
        return False
    return True


def policies(run: Run, slots: list[int]) -> list[Policy]:
    """Exact, then every policy at every budget that has room for it."""
    names = run.options.policies
    found = [Policy.parse(name, n) for n in slots for name in names if fits(name, n)]
    return [Policy.parse("exact", 0), *(p for p in found if p.name != "exact")]


def accuracy(run: Run, slots: list[int]) -> Rows:
    """A row per policy, slots, seed and document, the policies that need no seeds first."""
    order = sorted(policies(run, slots), key=lambda p: (p.name != "exact", p.method.seeded))
    rows = nll.losses(run, order)
    return [{"what": "nll", **{k: v for k, v in row.items() if k != "parts"}} for row in rows]
