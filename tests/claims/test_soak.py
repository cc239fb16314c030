"""10,000 requests with as many budgets, half of them cut off: nothing grows, nothing is left.

`make test-ops TESTS="tests/claims/test_soak.py -s"` prints the curve.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import time
from pathlib import Path

import httpx
import pytest
import random_llama
from serving import serve

pytestmark = [pytest.mark.ops, pytest.mark.server]
REQUESTS = int(os.environ.get("EXPRESS_SOAK_REQUESTS", "10000"))
AT_ONCE = 48
#: What a process may still grow by after a third of the requests, bytes.
FLAT = 48 << 20
GAUGES = (
    "vllm:express_held_kv_tokens", "vllm:express_exact_kv_tokens", "vllm:express_requests_running",
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
)  # fmt: skip


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """One layer, two KV heads: time goes into requests, not into matrices."""
    shape = random_llama.Shape(layers=1, heads=2, kv_heads=2)
    return random_llama.write(tmp_path_factory.mktemp("model"), shape)


def plan(seed=0):
    """Requests: prompt length, output length, budget, and after how many events it is cut off."""
    dice = random.Random(seed)
    budgets = {(memory, memory) for memory in range(128, 4096)}
    while len(budgets) < REQUESTS:
        memory = dice.randint(140, 4096)
        budgets.add((memory, dice.randint(128, memory)))
    chosen = dice.sample(sorted(budgets), REQUESTS)
    for seed, (memory, compute) in enumerate(chosen):
        # Most are longer than what they may hold, a few far longer.
        prompt = dice.choice([dice.randint(1, 200), dice.randint(150, 500), memory])
        yield {
            "prompt": [dice.randrange(1, 49000) for _ in range(min(prompt, 700))],
            "max_tokens": dice.randint(1, 24), "ignore_eos": True, "stream": True,
            "temperature": 0,
            "express": {
                "memory_tokens": memory, "compute_tokens": compute, "seed": seed,
                "profile": dice.choice(["recent", "even"]),
            },
        }, dice.randint(0, 20) if dice.random() < 0.5 else None  # fmt: skip


def family(parent):
    """Process ids of a process and all that came from it."""
    found = [parent]
    for pid in found:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found


def resident(pids):
    """Name and resident bytes of each process."""
    page, found = os.sysconf("SC_PAGE_SIZE"), {}
    for pid in pids:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        found[f"{name} {pid}"] = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
    return found


async def send(client, body, cut):
    """One request, cut off after `cut` events of its stream; -> its status."""
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        events = 0
        async for _ in answer.aiter_lines():
            events += 1
            if cut is not None and events > cut:
                return "cut"
    return answer.status_code


async def load(url, pids):
    """All requests, AT_ONCE at a time; -> counts by status, and the curve of resident memory."""
    requests, statuses, curve = plan(), {}, []
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def work():
            for body, cut in requests:
                status = await send(client, {"model": "small", **body}, cut)
                statuses[status] = statuses.get(status, 0) + 1
                if sum(statuses.values()) % max(1, REQUESTS // 40) == 0:
                    curve.append((sum(statuses.values()), resident(pids)))

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return statuses, curve


def gauges(server):
    found = dict.fromkeys(GAUGES, 0.0)
    for line in server.client.get("/metrics").text.splitlines():
        name = line.partition("{")[0]
        if name in found:
            found[name] += float(line.rsplit(" ", 1)[1])
    return found


def test_nothing_grows_and_nothing_is_left(small_model, tmp_path):
    log = tmp_path / "log.txt"
    with serve(small_model, log, "--max-num-seqs", str(AT_ONCE)) as server:
        pids = family(server.pid)
        statuses, curve = asyncio.run(load(server.url, pids))
        for done, sizes in curve:
            print(done, {name: f"{size / 2**20:.0f} MiB" for name, size in sizes.items()})
        assert sum(statuses.values()) == REQUESTS and set(statuses) == {200, "cut"}, statuses
        assert statuses["cut"] > REQUESTS / 3
        deadline = time.monotonic() + 30
        while any(gauges(server).values()) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert gauges(server) == dict.fromkeys(GAUGES, 0.0)
        assert server.client.get("/v1/express/status").json()["requests_running"] == 0
    warm = [sizes for done, sizes in curve if done >= REQUESTS / 3]
    growth = {name: warm[-1][name] - size for name, size in warm[0].items()}
    print(json.dumps(growth))
    assert max(growth.values()) < FLAT, growth


def test_the_load_is_what_it_says():
    bodies = [body for body, _ in plan()]
    budgets = {tuple(sorted(body["express"].items())) for body in bodies}
    assert len(bodies) == len(budgets) == REQUESTS
    assert {body["express"]["profile"] for body in bodies} == {"recent", "even"}
    longer = [
        b for b in bodies if len(b["prompt"]) + b["max_tokens"] > b["express"]["compute_tokens"]
    ]
    assert len(longer) > REQUESTS / 20
    cut = [cut for _, cut in itertools.islice(plan(), REQUESTS) if cut is not None]
    assert 0.45 * REQUESTS < len(cut) < 0.55 * REQUESTS
