"""The programs of examples/ run, and show what they say."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"

sys.path.insert(0, str(EXAMPLES))
from tenants import BUDGETS, gateway  # noqa: E402

pytestmark = pytest.mark.server


def run(name, *arguments, **environment):
    command = [sys.executable, EXAMPLES / name, *arguments]
    done = subprocess.run(
        command, env=os.environ | environment, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_openai_client(server):
    printed = run("openai_client.py", "--url", f"{server.url}/v1")
    assert re.search(r"held: \{.*'memory_tokens': 512, ", printed)
    assert printed.count("held: ") == 2
    assert "refused: express.memory_tokens=12 is not allowed" in printed


async def send(server, key, **body):
    """A chat through the gateway, as a client with this key sends it."""
    transport = httpx.ASGITransport(gateway(server.url))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        return await client.post(
            "/v1/chat/completions", headers={"Authorization": f"Bearer {key}"}, timeout=300,
            json={"model": "small", "max_tokens": 4, **body},
        )  # fmt: skip


@pytest.mark.parametrize("key", BUDGETS)
@pytest.mark.parametrize("asked", [
    {}, {"express": {"memory_tokens": 4096}}, {"vllm_xargs": {"express_memory_tokens": 4096}},
])  # fmt: skip
def test_a_tenant_gets_its_own_budget(server, key, asked):
    text = (ROOT / "LICENSE").read_text()
    messages = [{"role": "user", "content": text}]
    answer = asyncio.run(send(server, key, messages=messages, **asked))
    used = answer.json()["usage"]["express"]
    assert used["memory_tokens"] == BUDGETS[key]["memory_tokens"] >= used["peak_kv_tokens"]


def test_a_stranger_is_refused(server):
    assert asyncio.run(send(server, "nobody", messages=[])).status_code == 401


def test_offline(quick):
    printed = run(
        "offline.py", "--model", str(quick.path), "--eager",
        VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # one start-up less
    )  # fmt: skip
    assert len(re.findall(r"^\{'express_.*\}: '.+'$", printed, re.M)) == 3
