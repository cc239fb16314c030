"""Ten minutes of chats on a CPU server, a third of them cut off: cached states hit, none is lost,
nothing grows.  `EXPRESS_SOAK_MINUTES=60` makes it an hour.

`make test-ops TESTS="tests/claims/test_soak_chats.py -s"` prints the curve.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time

import httpx
import pytest
from serving import serve
from test_soak import FLAT, GAUGES, family, gauges, resident, send, small_model  # noqa: F401

pytestmark = [pytest.mark.ops, pytest.mark.server]
MINUTES = float(os.environ.get("EXPRESS_SOAK_MINUTES", "10"))
USERS, TENANTS, TURNS = 24, 3, 6
#: Twice what runs at once takes: the other half holds the states.
BLOCKS = "640"
BUDGETS = ({"memory_tokens": 512}, {"memory_tokens": 1024}, {"mode": "exact"})


def words(dice, low, high):
    return [dice.randrange(1, 49000) for _ in range(dice.randint(low, high))]


async def conversation(client, dice, system, counts):
    """Turns of one user, who leaves in the middle of the last; the system prompt is a tenant's."""
    tenant, budget = dice.randrange(TENANTS), dice.choice(BUDGETS)
    history = list(system[tenant])
    for turn in range(dice.randint(1, TURNS)):
        history += words(dice, 50, 250)
        body = {
            "model": "small", "prompt": history, "max_tokens": dice.randint(5, 40),
            "ignore_eos": True, "cache_salt": str(tenant), "express": budget,
        }  # fmt: skip
        if turn and dice.random() < 0.3:
            status = await send(client, {**body, "stream": True}, 3)
            counts[status] = counts.get(status, 0) + 1
            return
        answer = await client.post("/v1/completions", json={**body, "return_token_ids": True})
        counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
        history += answer.json()["choices"][0]["token_ids"]


async def chats(url, pids):
    """-> counts by status, and resident memory by minutes."""
    end, counts, curve = time.monotonic() + 60 * MINUTES, {}, []
    system = [words(random.Random(tenant), 700, 700) for tenant in range(TENANTS)]

    async def user(number):
        dice = random.Random(number)
        while time.monotonic() < end:
            await conversation(client, dice, system, counts)

    async def watch():
        while time.monotonic() < end:
            curve.append((MINUTES - (end - time.monotonic()) / 60, resident(pids)))
            await asyncio.sleep(1.5 * MINUTES)

    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        await asyncio.gather(watch(), *(user(number) for number in range(USERS)))
    curve.append((MINUTES, resident(pids)))
    return counts, curve


def metric(server, name):
    lines = server.client.get("/metrics").text.splitlines()
    return sum(float(x.rsplit(" ", 1)[1]) for x in lines if x.partition("{")[0] == name)


def test_chats_hit_and_lose_nothing(small_model, tmp_path):  # noqa: F811
    more = ("--max-num-seqs", "16", "--num-gpu-blocks-override", BLOCKS)
    with serve(small_model, tmp_path / "log.txt", *more) as server:
        pids = family(server.pid)
        counts, curve = asyncio.run(chats(server.url, pids))
        hits = metric(server, "vllm:prefix_cache_hits_total")
        share = hits / metric(server, "vllm:prefix_cache_queries_total")
        print(f"{counts}: {share:.1%} of the prompts' tokens were cached")
        for minutes, sizes in curve:
            print(f"{minutes:.1f} min", {n: f"{size / 2**20:.0f} MiB" for n, size in sizes.items()})
        assert set(counts) == {200, "cut"}, counts
        assert share > 0.6
        deadline = time.monotonic() + 30
        while any(gauges(server).values()) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert gauges(server) == dict.fromkeys(GAUGES, 0.0)
        assert server.client.post("/reset_prefix_cache").status_code in (200, 404)
    warm = [sizes for minutes, sizes in curve if minutes >= MINUTES / 3]
    growth = {name: warm[-1][name] - size for name, size in warm[0].items()}
    print(json.dumps(growth))
    assert max(growth.values()) < FLAT, growth
