"""A real server over HTTP: budgets on all three routes, refusals, bounds, disconnects."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from serving import BLOCK_SIZE, watch

pytestmark = pytest.mark.server


def completion(server, prompt, max_tokens=16, **arguments):
    body = {
        "model": "small",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "vllm_xargs": {f"express_{k}": v for k, v in arguments.items()},
    }
    return server.client.post("/v1/completions", json=body)


@pytest.fixture(scope="module")
def size(quick):
    return quick.size()


@pytest.fixture(scope="module")
def long_prompt(tokens):
    """6,000 tokens of real text."""
    return tokens[:6000]


def test_the_log_says_that_express_runs(server):
    text = server.log.read_text()
    assert "express: ServerConfig(memory_tokens=1024" in text


def test_a_long_prompt_never_holds_more_blocks_than_its_budget(server, size, long_prompt):
    assert server.blocks() == 0
    done, seen = threading.Event(), []
    watcher = threading.Thread(target=watch, args=(server, done, seen))
    watcher.start()
    answer = completion(server, long_prompt, max_tokens=100, memory_tokens=512)
    done.set()
    watcher.join()
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    assert usage["prompt_tokens"] == 6000 and usage["completion_tokens"] == 100
    assert max(seen) == math.ceil(size.slots(512) / BLOCK_SIZE)
    assert server.blocks() == 0, "every block came back"


def test_different_budgets_run_at_once(server, long_prompt):
    budgets = [{"memory_tokens": 256}, {"memory_tokens": 512, "profile": "even"}, {"mode": "exact"},
               {"memory_tokens": 512, "compute_tokens": 200, "seed": 5}]  # fmt: skip
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda b: completion(server, long_prompt[:700], 24, **b), budgets))
    assert [a.status_code for a in answers] == [200] * 4
    assert all(a.json()["usage"]["completion_tokens"] > 0 for a in answers)


def test_structured_output_keeps_to_its_form_past_the_budget(server, size, long_prompt):
    form = r"[A-Z][a-z]{2,7}, aged [1-9][0-9]\."
    body = {
        "model": "small", "prompt": long_prompt[:2000], "max_tokens": 40, "temperature": 0,
        "vllm_xargs": {"express_memory_tokens": 256}, "structured_outputs": {"regex": form},
    }  # fmt: skip
    answer = server.client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    text = answer.json()["choices"][0]["text"]
    assert re.fullmatch(form, text), text
    assert answer.json()["usage"]["express"]["peak_kv_tokens"] == size.tokens(size.slots(256))


def test_responses_take_a_budget(server):
    body = {
        "model": "small", "input": "Say hello.", "max_output_tokens": 8, "temperature": 0,
        "vllm_xargs": {"express_memory_tokens": 256},
    }  # fmt: skip
    answer = server.client.post("/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["output_tokens"] == 8


def test_disconnects_return_every_block(server, long_prompt):
    """Streams cut off in the middle of the prefill and of the decode."""
    for wait in (0.3, None):
        body = {
            "model": "small", "prompt": long_prompt[:3000], "max_tokens": 200, "stream": True,
            "vllm_xargs": {"express_memory_tokens": 512},
        }  # fmt: skip
        timeout = httpx.Timeout(300, read=wait)
        try:
            with httpx.stream(
                "POST", f"{server.url}/v1/completions", json=body, timeout=timeout
            ) as stream:
                for line in stream.iter_lines():
                    if line.startswith("data: ") and json.loads(line[6:])["choices"]:
                        break
        except httpx.ReadTimeout:
            pass
    deadline = time.monotonic() + 60
    while server.blocks() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.blocks() == 0
    assert completion(server, "Hello", 2).status_code == 200
