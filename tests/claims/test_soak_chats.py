"""Ten minutes of chats on a CPU server, a third of them cut off: cached states hit, no request
fails, no block is lost, nothing grows, and at the end a hit still gives the tokens of a cold run.

`make test-ops TESTS="tests/claims/test_soak_chats.py -s"` prints the curve.
`EXPRESS_SOAK_MINUTES=60` makes it an hour, `EXPRESS_SOAK_RESULT=speed/soak-chats` stores the curve
as bench/results/speed/soak-chats.json.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter, deque

import httpx
import pytest
from serving import serve
from test_soak import FLAT, GAUGES, family, gauges, resident, small_model  # noqa: F401

from bench import record

pytestmark = [pytest.mark.ops, pytest.mark.server]
MINUTES = float(os.environ.get("EXPRESS_SOAK_MINUTES", "10"))
RESULT = os.environ.get("EXPRESS_SOAK_RESULT", "")
USERS, TENANTS, TURNS = 24, 3, 6
#: Twice what runs at once takes: the other half holds the states.
BLOCKS = 640
BUDGETS = ({"memory_tokens": 512}, {"memory_tokens": 1024}, {"mode": "exact"})
#: Points of the curve, and turns that are asked again at the end.
POINTS, AGAIN = 40, 24
#: Gap of two tokens' log-probabilities that rounding to bfloat16 may turn round.
TIE = 0.25
#: Processes by the name that vLLM gives them.
PROCESSES = {"vllm": "API server", "VLLM::EngineCor": "engine", "VLLM::Worker": "worker"}
QUERIES, HITS = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"


def words(dice, low, high):
    return [dice.randrange(1, 49000) for _ in range(dice.randint(low, high))]


async def cut_off(client, body):
    """Leave in the middle of a stream; -> "cut", its status if it ended before that, or a fault."""
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        events = 0
        async for line in answer.aiter_lines():
            if answer.status_code != 200 or '"error"' in line:
                return f"{answer.status_code}: {line[:200]}"
            events += bool(line)
            if events > 2:
                return "cut"
    return answer.status_code


async def conversation(client, dice, system, counts, turns):
    """Turns of one user, who leaves in the middle of the last; the system prompt is a tenant's."""
    tenant, budget = dice.randrange(TENANTS), dice.choice(BUDGETS)
    history = list(system[tenant])
    for turn in range(dice.randint(1, TURNS)):
        history += words(dice, 50, 250)
        body = {
            "model": "small", "prompt": list(history), "max_tokens": dice.randint(5, 40),
            "ignore_eos": True, "cache_salt": str(tenant), "express": budget, "temperature": 0,
        }  # fmt: skip
        if turn and dice.random() < 0.3:
            counts[await cut_off(client, body)] += 1
            return
        answer = await client.post("/v1/completions", json={**body, "return_token_ids": True})
        counts[answer.status_code] += 1
        assert answer.status_code == 200, answer.text[:500]
        history += answer.json()["choices"][0]["token_ids"]
        turns.append(body)


def memory(pids):
    """Resident MiB of each process."""
    found = {}
    for name, size in resident(pids).items():
        name = PROCESSES.get(name.rpartition(" ")[0], name)
        found[f"{name}, MiB"] = round(size / 2**20, 1)
    return found


def total(text, name):
    """The sum of a metric's samples in the text of /metrics."""
    lines = text.splitlines()
    return sum(float(x.rsplit(" ", 1)[1]) for x in lines if x.partition("{")[0] == name)


async def chats(url, pids):
    """-> counts by status, the curve, and the last turns that were answered."""
    start, counts, curve, turns = time.monotonic(), Counter(), [], deque(maxlen=AGAIN)
    system = [words(random.Random(tenant), 700, 700) for tenant in range(TENANTS)]
    before = {QUERIES: 0.0, HITS: 0.0}

    def minutes():
        return (time.monotonic() - start) / 60

    async def user(number):
        dice = random.Random(number)
        while minutes() < MINUTES:
            await conversation(client, dice, system, counts, turns)

    async def point():
        text = (await client.get("/metrics")).text
        new = {name: total(text, name) - value for name, value in before.items()}
        for name in before:
            before[name] += new[name]
        blocks = round(total(text, "vllm:kv_cache_usage_perc") * (BLOCKS - 1))
        curve.append({
            "minutes": round(minutes(), 2), "answers": counts[200], "cut off": counts["cut"],
            "hit rate": round(new[HITS] / max(1, new[QUERIES]), 4),
            "preemptions": round(total(text, "vllm:num_preemptions_total")),
            "blocks in use": blocks, **memory(pids),
        })  # fmt: skip
        print(curve[-1], flush=True)

    async def watch():
        while minutes() < MINUTES:
            await asyncio.sleep(60 * MINUTES / POINTS)
            await point()

    async with httpx.AsyncClient(base_url=url, timeout=120 + 60 * MINUTES) as client:
        await asyncio.gather(watch(), *(user(number) for number in range(USERS)))
        await point()
    return counts, curve, list(turns)


def ask(server, body):
    """-> the tokens of the answer, their gaps to the second best, and how much was cached."""
    more = {"return_token_ids": True, "logprobs": 2, "return_tokens_as_token_ids": True}
    answer = server.client.post("/v1/completions", json=body | more)
    assert answer.status_code == 200, answer.text
    (choice,), usage = answer.json()["choices"], answer.json()["usage"]
    best = [sorted(top.values(), reverse=True)[:2] for top in choice["logprobs"]["top_logprobs"]]
    gaps = [first - second for first, second in best]
    return choice["token_ids"], gaps, usage["prompt_tokens_details"]["cached_tokens"]


def assert_same(warm, cold):
    """The same tokens, up to the first tie."""
    for at, (found, wanted, gap) in enumerate(zip(warm[0], *cold[:2], strict=True)):
        if found != wanted:
            assert gap < TIE, (at, warm[2], gap)
            return


def store(curve, counts, share, seconds, commit):
    """As every result is stored; `commit` is the code that was started."""
    record.save(
        RESULT, curve, commit=commit, seconds=round(seconds),
        command="python -m pytest -m ops tests/claims/test_soak_chats.py",
        environment={"EXPRESS_SOAK_MINUTES": f"{MINUTES:g}", "EXPRESS_SOAK_RESULT": RESULT},
        model="random Llama of one layer, two KV heads", dtype="bfloat16", users=USERS,
        blocks=BLOCKS, budgets=BUDGETS, counts={str(name): count for name, count in counts.items()},
        share_of_prompt_tokens_cached=round(share, 4),
    )  # fmt: skip


def test_chats_hit_and_lose_nothing(small_model, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")  # /reset_prefix_cache
    commit, start = record.commit(), time.monotonic()
    more = ("--max-num-seqs", "16", "--num-gpu-blocks-override", str(BLOCKS),
            "--enable-prompt-tokens-details", "--dtype", "bfloat16")  # fmt: skip
    with serve(small_model, tmp_path / "log.txt", *more) as server:
        counts, curve, turns = asyncio.run(chats(server.url, family(server.pid)))
        text = server.client.get("/metrics").text
        share = total(text, HITS) / total(text, QUERIES)
        print(f"{dict(counts)}: {share:.1%} of the prompts' tokens were cached")
        if RESULT:
            store(curve, counts, share, time.monotonic() - start, commit)
        assert set(counts) == {200, "cut"}, counts
        assert share > 0.6
        deadline = time.monotonic() + 120
        while any(gauges(server).values()) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert gauges(server) == dict.fromkeys(GAUGES, 0.0)
        warm, cold = [ask(server, body) for body in turns], []
        for body in turns:
            # vLLM resets only a pool of which every block is free.
            assert server.client.post("/reset_prefix_cache").json() == {"success": True}
            cold.append(ask(server, body))
        hits = sum(cached > 0 for _, _, cached in warm)
        same = sum(first[0] == second[0] for first, second in zip(warm, cold, strict=True))
        print(f"asked again: {hits} of {len(turns)} hit, {same} give the same tokens cold")
        assert hits > len(turns) / 2 and not any(cached for _, _, cached in cold)
        for first, second in zip(warm, cold, strict=True):
            assert_same(first, second)
    sizes = [
        {name: value for name, value in point.items() if name.endswith(", MiB")}
        for point in curve
        if point["minutes"] >= MINUTES / 3
    ]
    growth = {name: round(sizes[-1][name] - size, 1) for name, size in sizes[0].items()}
    print(json.dumps(growth))
    assert max(growth.values()) < FLAT / 2**20, growth
