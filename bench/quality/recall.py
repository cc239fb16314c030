"""Recall over a distance: needles, key-value pairs and repeated passages.

Needle and key-value prompts follow RULER (arXiv 2404.06654): facts hidden in a real text, a
question about one of them at the end.  The right answer's log-probability stands against those of
answers of the same form (`choice`), and `match` says whether greedy decoding would have given it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .harness import Stream, log_probabilities
from .policies import DEFAULT, USUAL, Policy, every
from .progress import Progress
from .run import Result, Rows, Run

FILE = "quality/recall"
SPLIT = "report"
BATCH = 64
FULL = {"slots": [1024, 2048], "length": 8192, "depths": (0.1, 0.5, 0.9),
        "policies": [*(n for n in USUAL if n != "random"), "express:profile=even"]}  # fmt: skip
SMALL = {"slots": [1024], "length": 3072, "depths": (0.5,), "documents": 2,
         "policies": ["exact", DEFAULT, "express", "express:profile=even", "streaming",
                      "snapkv"]}  # fmt: skip
#: Tokens of a repeated passage, and how far from its second occurrence the first may lie.
PASSAGE = 96
DISTANCES = (6000, 3000, 1500)
#: Room for an answer: its tokens must fit the model's context too.
ANSWER = 8
#: Wrong answers beside the right one.
DISTRACTORS = 7
DIGITS = 6
WORDS = """
    amber basin candle desert ember falcon garden harbor island jungle kettle lantern meadow
    needle orchard pepper quarry ribbon saddle timber umbrella valley walnut yellow zipper
    anchor blanket copper dragon engine feather glacier hammer ivory jacket kernel ladder marble
    nickel oyster pillow quartz rocket silver tunnel urchin velvet whistle
""".split()  # noqa: SIM905


@dataclass
class Case:
    """A prompt of a fixed length, its right answer first among the candidates, and how many tokens
    before the end the answer stands."""

    prompt: list[int]
    candidates: list[list[int]]
    distance: int


Tokenize = Callable[[str], list[int]]


def needle(tokenize: Tokenize, hay: Sequence[int], length: int, depth: float, seed: int) -> Case:
    """One number among `length` tokens of text, at `depth` (0: start, 1: end)."""
    rng = random.Random(seed)
    word = rng.choice(WORDS)
    numbers = _numbers(rng, 1 + DISTRACTORS)
    fact = tokenize(f"\n\nThe magic number of the {word} is {numbers[0]}.\n\n")
    question = tokenize(f"\n\nRemember: The magic number of the {word} is")
    return _case(tokenize, hay, length, [(depth, fact)], question, numbers, 0)


def pairs(tokenize: Tokenize, hay: Sequence[int], length: int, depth: float, seed: int) -> Case:
    """Eight numbers of eight words spread evenly; the distractors are the other seven."""
    rng = random.Random(seed)
    words = rng.sample(WORDS, 1 + DISTRACTORS)
    numbers = _numbers(rng, 1 + DISTRACTORS)
    depths = [(i + 0.5) / len(words) for i in range(len(words))]
    asked = min(range(len(words)), key=lambda i: abs(depths[i] - depth))
    facts = [
        (d, tokenize(f"\n\nThe magic number of the {w} is {n}.\n\n"))
        for d, w, n in zip(depths, words, numbers, strict=True)
    ]
    question = tokenize(f"\n\nRemember: The magic number of the {words[asked]} is")
    order = [numbers[asked], *(n for i, n in enumerate(numbers) if i != asked)]
    return _case(tokenize, hay, length, facts, question, order, asked)


TASKS = {"needle": needle, "pairs": pairs}
ALL = ("repeated", *TASKS)


def _numbers(rng: random.Random, count: int) -> list[str]:
    """Numbers that differ in their first digit, so that the first token tells them apart."""
    return [str(d) + "".join(rng.choices("0123456789", k=DIGITS - 1))
            for d in rng.sample(range(1, 10), count)]  # fmt: skip


def _case(
    tokenize: Tokenize, hay: Sequence[int], length: int, facts: list[tuple[float, list[int]]],
    question: list[int], answers: list[str], asked: int,
) -> Case:  # fmt: skip
    room = length - len(question) - sum(len(fact) for _, fact in facts)
    if room > len(hay):
        raise ValueError(f"the text has {len(hay)} tokens, {room} are needed")
    prompt: list[int] = []
    used, place = 0, 0
    for i, (depth, fact) in enumerate(facts):
        stop = round(depth * room)
        prompt += hay[used:stop]
        used = stop
        if i == asked:
            place = len(prompt)
        prompt += fact
    prompt += [*hay[used:room], *question]
    assert len(prompt) == length
    return Case(prompt, [tokenize(f" {answer}") for answer in answers], length - place)


@torch.no_grad()
def answer(stream: Stream, model: Any, cases: Sequence[Case], chunk: int) -> list[dict[str, Any]]:
    """Log-probability of every candidate after its prompt; prompts and answers of equal lengths."""
    device = model.device
    prompts = torch.tensor([case.prompt for case in cases], device=device)
    last = stream.feed(prompts, chunk)[:, -1:]
    scores, match = [], None
    for candidate in range(len(cases[0].candidates)):
        ids = torch.tensor([case.candidates[candidate] for case in cases], device=device)
        hidden = torch.cat([last, stream.fork().feed(ids[:, :-1])], 1)
        found, first = log_probabilities(model, hidden, ids)
        scores.append(found.sum(1).double().cpu())
        match = first.all(1).cpu() if match is None else match
    table = torch.stack(scores, 1)  # [cases, candidates]
    assert match is not None
    return [
        {"log_probability": round(float(row[0]), 4),
         "margin": round(float(row[0] - row[1:].max()), 4),
         "choice": bool(row[0] > row[1:].max()), "match": bool(hit)}
        for row, hit in zip(table, match, strict=True)
    ]  # fmt: skip


def measure(run: Run) -> Result:
    options = run.options
    policies = every(options.policies, options.slots)
    rows: Rows = []
    if "repeated" in options.tasks:
        rows += repetitions(run, policies)
    return rows + answers(run, policies, [t for t in TASKS if t in options.tasks]), {}


def answers(run: Run, policies: Sequence[Policy], tasks: Sequence[str]) -> Rows:
    """A row per policy, slots, task, depth and document."""
    options, layers, names = run.options, run.heads.layers, list(run.documents)
    length = options.length - ANSWER
    places = [(depth, name) for depth in options.depths for name in names]
    groups = [places[at : at + options.batch] for at in range(0, len(places), options.batch)]
    steps = (-(-length // options.chunk) + 1 + DISTRACTORS) * layers
    rows: Rows = []
    with Progress("recall", steps * len(policies) * len(tasks) * len(groups)) as progress:
        for policy, task, group in product(policies, tasks, groups):
            progress.say(f"{policy.label} {policy.slots} {task}")
            cases = [
                TASKS[task](run.tokenize, run.documents[name], length, depth, names.index(name))
                for depth, name in group
            ]
            stream = Stream(run.model, policy.caches(run.heads), tick=progress.step)
            found = answer(stream, run.model, cases, options.chunk)
            rows += [
                {"policy": policy.label, "slots": policy.slots, "task": task, "length": length,
                 "depth": depth, "document": name, "distance": case.distance, **result}
                for (depth, name), case, result in zip(group, cases, found, strict=True)
            ]  # fmt: skip
    return rows


def repeated(
    hay: Sequence[int], passages: Sequence[Sequence[int]], distances: Sequence[int], length: int,
    present: bool,
) -> tuple[list[int], list[int]]:  # fmt: skip
    """A text that ends with the passages' second occurrences -> (ids, where each of them begins).

    Passage i first occurs distances[i] tokens before its second one; with `present` False the text
    goes on there instead.
    """
    size = len(passages[0])
    begins = [length - (len(passages) - i) * size for i in range(len(passages))]
    ids = list(hay[: begins[0]])
    assert len(ids) == begins[0], "the text is too short"
    for passage, begin, distance in zip(passages, begins, distances, strict=True):
        at = begin - distance
        assert at >= 0 and (at + size <= begins[0]), "first occurrences lie in the text"
        if present:
            ids[at : at + size] = passage
    return ids + [token for passage in passages for token in passage], begins


@torch.no_grad()
def repetitions(run: Run, policies: Sequence[Policy]) -> Rows:
    """A row per policy, slots, document and distance: NLL of a passage's second occurrence
    (`second`) and of the same tokens in the same place without a first one (`control`)."""
    options, names = run.options, list(run.documents)
    farthest = options.length - 4 * PASSAGE
    distances = [d for d in DISTANCES if d < farthest] or [farthest]
    groups = [names[at : at + options.batch] for at in range(0, len(names), options.batch)]
    steps = -(-(options.length - 1) // options.chunk) * run.heads.layers
    rows: Rows = []
    with Progress("repeated", 2 * steps * len(policies) * len(groups)) as progress:
        for policy, group in product(policies, groups):
            progress.say(f"{policy.label} {policy.slots}")
            found = {}
            for present in (True, False):
                ids, begin = _repeating(run, group, distances, present)
                stream = Stream(run.model, policy.caches(run.heads), tick=progress.step)
                hidden = stream.feed(ids[:, :-1], options.chunk)[:, begin - 1 :]
                logs, _ = log_probabilities(run.model, hidden, ids[:, begin:])
                found[present] = -logs.double().cpu()
            rows += _repeated_rows(policy, group, distances, found)
    return rows


def _repeating(
    run: Run, group: Sequence[str], distances: Sequence[int], present: bool
) -> tuple[Tensor, int]:
    """Texts [B, length] with passages of the next document in the list, and where the first of
    their second occurrences begins."""
    names, rows, begins = list(run.documents), [], [0]
    for name in group:
        other = run.documents[names[(names.index(name) + 1) % len(names)]]
        passages = [other[1000 + i * PASSAGE : 1000 + (i + 1) * PASSAGE]
                    for i in range(len(distances))]  # fmt: skip
        ids, begins = repeated(
            run.documents[name], passages, distances, run.options.length, present
        )
        rows.append(ids)
    return torch.tensor(rows, device=run.model.device), begins[0]


def _repeated_rows(
    policy: Policy, group: Sequence[str], distances: Sequence[int], found: dict[bool, Tensor]
) -> Rows:
    """The first 8 tokens of a passage are left out: nothing yet says that it is repeated."""
    rows = []
    for i, distance in enumerate(distances):
        part = slice(i * PASSAGE + 8, (i + 1) * PASSAGE)
        for r, name in enumerate(group):
            rows.append({
                "policy": policy.label, "slots": policy.slots, "task": "repeated",
                "document": name, "distance": distance,
                "second": round(float(found[True][r, part].mean()), 5),
                "control": round(float(found[False][r, part].mean()), 5),
            })  # fmt: skip
    return rows
