"""Greedy answers to a file's questions, right or wrong: a line is {"question": .., "answer": ..}.

An answer as GSM8K writes it, reasoning and then `#### 42`, counts by what follows the marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..harness import Stream
from ..policies import Policy
from ..progress import Progress
from ..run import Rows, Run

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def read(path: Path, most: int) -> list[tuple[str, str]]:
    """The first `most` questions and their answers."""
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        entry = json.loads(line)
        if not {"question", "answer"} <= entry.keys():
            raise ValueError(f"{path.name}, line {number}: it needs `question` and `answer`")
        found.append((str(entry["question"]), str(entry["answer"])))
    return found[:most]


def right(given: str, answer: str) -> bool:
    """Whether the last number of `given`, or its last line if the answer is no number, is it."""
    wanted = _plain(answer.rpartition("####")[2])
    if NUMBER.fullmatch(wanted):
        numbers = NUMBER.findall(given)
        return bool(numbers) and _value(numbers[-1]) == _value(wanted)
    lines = [_plain(line) for line in given.splitlines() if line.strip()]
    return bool(lines) and lines[-1] == wanted


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).strip(" .*$")


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def prompt(run: Run, question: str) -> list[int]:
    """As the model's chat template has it, or plain if it has none."""
    if getattr(run.tokenizer, "chat_template", None):
        text = run.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        return run.tokenize(text)
    return run.tokenize(f"Question: {question}\nAnswer:")


def greedy(stream: Stream, ids: Sequence[int], most: int, stop: Sequence[int]) -> list[int]:
    """Up to `most` tokens after the prompt, without the one that stops."""
    model = stream.model
    found: list[int] = []
    fed = torch.tensor([list(ids)], device=model.device)
    while len(found) < most:
        with torch.no_grad():
            token = int(model.lm_head(stream.feed(fed)[:, -1]).argmax(-1))
        if token in stop:
            break
        found.append(token)
        fed = torch.tensor([[token]], device=model.device)
    return found


def ends(run: Run) -> list[int]:
    """The tokens that end an answer."""
    config = getattr(run.model, "generation_config", None)
    stop = getattr(config, "eos_token_id", None)
    stop = run.tokenizer.eos_token_id if stop is None else stop
    return stop if isinstance(stop, list) else [stop]


@dataclass
class Case:
    prompt: list[int]
    answer: str


def cases(run: Run) -> list[Case]:
    entries = read(run.options.data, run.options.questions)
    return [Case(prompt(run, question), answer) for question, answer in entries]


def measure(run: Run, asked: Sequence[Case], policies: Sequence[Policy]) -> Rows:
    """A row per question, policy and slots; a question is stored once every policy answered it."""
    options = run.options
    rows: Rows = []
    total = len(policies) * len(asked) * options.answer * run.heads.layers
    with Progress("questions", total) as progress:
        for number, case in enumerate(asked):
            found = []
            for policy in policies:
                progress.say(f"{policy.label} {policy.slots}, question {number}")
                found.append(_row(run, number, case, policy, progress))
            rows += found
    return rows


def _row(run: Run, number: int, case: Case, policy: Policy, progress: Progress) -> dict[str, Any]:
    caches = policy.caches(run.heads, run.options.seeds[0])
    stream = Stream(run.model, caches, tick=progress.step)
    given = greedy(stream, case.prompt, run.options.answer, ends(run))
    text = run.tokenizer.decode(given, skip_special_tokens=True)
    return {"what": "answers", "policy": policy.label, "slots": policy.slots, "question": number,
            "right": right(text, case.answer), "tokens": stream.tokens}  # fmt: skip
