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

from .harness import Heads, Stream, log_probabilities
from .policies import Policy
from .progress import Progress

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


def measure(
    model: Any, heads: Heads, tokenize: Tokenize, documents: dict[str, list[int]],
    policies: Sequence[Policy], lengths: Sequence[int], depths: Sequence[float], chunk: int,
    batch: int, tasks: Sequence[str] = tuple(TASKS),
) -> list[dict[str, Any]]:  # fmt: skip
    """A row per policy, slots, task, length, depth and document."""
    names = list(documents)
    places = [(depth, name) for depth in depths for name in names]
    groups = [places[at : at + batch] for at in range(0, len(places), batch)]
    answers = (1 + DISTRACTORS) * heads.layers
    steps = sum(-(-n // chunk) * heads.layers + answers for n in lengths)
    rows = []
    with Progress("recall", steps * len(policies) * len(tasks) * len(groups)) as progress:
        for policy, task, length, group in product(policies, tasks, lengths, groups):
            progress.say(f"{policy.label} {policy.slots} {task} {length}")
            cases = [
                TASKS[task](tokenize, documents[name], length, depth, names.index(name))
                for depth, name in group
            ]
            stream = Stream(model, policy.caches(heads), tick=progress.step)
            found = answer(stream, model, cases, chunk)
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
def measure_repeated(
    model: Any, heads: Heads, documents: dict[str, list[int]], policies: Sequence[Policy],
    distances: Sequence[int], length: int, size: int, chunk: int, batch: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row per policy, slots, document and distance: NLL of a passage's second occurrence
    (`second`) and of the same tokens in the same place without a first one (`control`).

    Passages come from the next document in the list.
    """
    names = list(documents)
    groups = [names[at : at + batch] for at in range(0, len(names), batch)]
    steps = -(-(length - 1) // chunk) * heads.layers
    rows = []
    with Progress("repeated", 2 * steps * len(policies) * len(groups)) as progress:
        for policy in policies:
            for group in groups:
                progress.say(f"{policy.label} {policy.slots}")
                found = {}
                for present in (True, False):
                    texts, begins = [], []
                    for name in group:
                        other = documents[names[(names.index(name) + 1) % len(names)]]
                        passages = [other[1000 + i * size : 1000 + (i + 1) * size]
                                    for i in range(len(distances))]  # fmt: skip
                        ids, begins = repeated(
                            documents[name], passages, distances, length, present
                        )
                        texts.append(ids)
                    ids = torch.tensor(texts, device=model.device)
                    stream = Stream(model, policy.caches(heads), tick=progress.step)
                    hidden = stream.feed(ids[:, :-1], chunk)
                    found[present] = (
                        -log_probabilities(model, hidden[:, begins[0] - 1 :], ids[:, begins[0] :])[
                            0
                        ]
                        .double()
                        .cpu()
                    )
                rows += _repeated_rows(policy, group, distances, size, found)
    return rows


def _repeated_rows(
    policy: Policy, group: Sequence[str], distances: Sequence[int], size: int,
    found: dict[bool, Tensor],
) -> list[dict[str, Any]]:  # fmt: skip
    """The first 8 tokens of a passage are left out: nothing yet says that it is repeated."""
    rows = []
    for i, distance in enumerate(distances):
        part = slice(i * size + 8, (i + 1) * size)
        for r, name in enumerate(group):
            rows.append({
                "policy": policy.label, "slots": policy.slots, "task": "repeated",
                "document": name, "distance": distance,
                "second": round(float(found[True][r, part].mean()), 5),
                "control": round(float(found[False][r, part].mean()), 5),
            })  # fmt: skip
    return rows
