"""Every way into a real server, with any lengths and budgets: 200 or 400, the engine alive, and the
engine's budget is the one in the answer."""

from __future__ import annotations

import base64
import io
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import random_llama
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import serve

pytestmark = [pytest.mark.ops, pytest.mark.server]
#: 27 usable blocks of 64 slots: the length that the engine fits.
FITTED = 27 * 64
COUNT, SUM = (f"vllm:express_memory_tokens_{part}" for part in ("count", "sum"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ways")
    model = random_llama.write(folder / "model")
    with serve(
        model, folder / "log.txt", "--max-model-len", "auto", "--num-gpu-blocks-override", "28",
        "--enable-prompt-embeds", "--enable-scale-out", "--max-num-batched-tokens", "1024",
    ) as running:  # fmt: skip
        assert running.client.get("/v1/models").json()["data"][0]["max_model_len"] == FITTED
        yield running


def embedded(tokens):
    buffer = io.BytesIO()
    torch.save(torch.randn(tokens, random_llama.HIDDEN), buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def words(tokens):
    return "one " * tokens


WAYS = {
    "/v1/completions": lambda n, k: {"prompt": [5] * n, "max_tokens": k},
    "/v1/completions?embeds": lambda n, k: {"prompt_embeds": embedded(n), "max_tokens": k},
    "/v1/completions?text": lambda n, k: {"prompt": words(n), "max_tokens": k},
    "/v1/chat/completions": lambda n, k: {
        "messages": [{"role": "user", "content": words(n)}], "max_tokens": k,
    },
    "/v1/responses": lambda n, k: {"input": words(n), "max_output_tokens": k},
    "/v1/messages": lambda n, k: {
        "messages": [{"role": "user", "content": words(n)}], "max_tokens": k,
    },
    "/v1/chat/completions/batch": lambda n, k: {
        "messages": [[{"role": "user", "content": words(n)}]], "max_tokens": k,
    },
    "/invocations": lambda n, k: {"prompt": [5] * n, "max_tokens": k},
    "/inference/v1/generate": lambda n, k: {
        "token_ids": [5] * n, "sampling_params": {"max_tokens": k},
    },
}  # fmt: skip

fields = st.fixed_dictionaries(
    {},
    optional={
        "memory_tokens": st.one_of(st.integers(100, FITTED + 100), st.just("512")),
        "memory": st.sampled_from(["10%", "60%", "200%", "1MiB", "3MiB", "1TiB"]),
        "compute_tokens": st.integers(100, 900),
        "seed": st.integers(-1, 9),
        "mode": st.sampled_from(["express", "exact"]),
        "profile": st.sampled_from(["recent", "even"]),
        "granted": st.just(["express", 1, 1, 0, "recent", 1, True]),
    },
)
tokens = st.one_of(st.integers(1, 300), st.sampled_from([700, FITTED - 9, FITTED, FITTED + 1]))


def body(way, prompt, output, budget, spelling):
    found = {"model": "small", **WAYS[way](prompt, output)}
    if spelling == "express":
        return {**found, "express": budget}
    extra = {f"express_{name}": value for name, value in budget.items()}
    if way.startswith("/inference"):
        sampling = {**found["sampling_params"], "extra_args": extra}
        return {**found, "sampling_params": sampling}
    return {**found, "vllm_xargs": extra}


def engine(server):
    """(requests, sum of their memory budgets) that have reached the engine."""
    return server.metric(COUNT), server.metric(SUM)


@settings(
    max_examples=120, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(
    st.sampled_from(sorted(WAYS)), tokens, st.integers(1, 12), fields,
    st.sampled_from(["express", "vllm_xargs"]),
)  # fmt: skip
def test_the_answer_is_the_engines(server, way, prompt, output, budget, spelling):
    requests, total = engine(server)
    answer = server.client.post(
        way.partition("?")[0], json=body(way, prompt, output, budget, spelling)
    )  # fmt: skip
    assert answer.status_code in (200, 400), answer.text
    assert server.client.get("/health").status_code == 200
    if answer.status_code == 400:
        assert len(answer.content) < 1024
        assert engine(server) == (requests, total), "a refused request never reaches the engine"
        return
    deadline = time.monotonic() + 5
    while engine(server)[0] == requests and time.monotonic() < deadline:
        time.sleep(0.02)
    now, after = engine(server)
    assert now == requests + 1
    used = (answer.json().get("usage") or {}).get("express")
    if used is not None:  # some answers have no usage at all
        assert used["memory_tokens"] == after - total
    else:
        assert "usage" not in answer.json()


def test_mixed_ways_at_once_leave_the_engine_alive(server):
    """Good and bad ones side by side: none is lost for another's sake."""
    cases = [
        (way, 40 + 7 * i, {"memory_tokens": size})
        for i, way in enumerate(sorted(WAYS) * 2)
        for size in (128, 12, FITTED + 1)
    ]  # fmt: skip

    def ask(case):
        way, prompt, budget = case
        sent = body(way, prompt, 4, budget, "express")
        return server.client.post(way.partition("?")[0], json=sent).status_code

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, cases))
    wanted = [200 if budget["memory_tokens"] == 128 else 400 for _, _, budget in cases]
    assert found == wanted
    assert server.client.get("/health").status_code == 200
