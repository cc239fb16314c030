"""Every generating route of a real server honours a budget or refuses it; none ignores it."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from budgets import WIDE
from serving import serve, wait_for_rest

from express_vllm.server.table import ROUTES, WITHOUT_BUDGET, decision, markdown

CHAT = [{"role": "user", "content": "What is 2+2?"}]
#: Route -> a body that it takes, without a budget.
BODIES = {
    "/v1/completions": {"prompt": "Hello", "max_tokens": 4},
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 4},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 4},
    "/v1/messages": {"messages": CHAT, "max_tokens": 4},
    "/v1/chat/completions/batch": {"messages": [CHAT, CHAT], "max_tokens": 4},
    "/invocations": {"messages": CHAT, "max_tokens": 4},
    "/generative_scoring": {"query": "Is it", "items": ["a", "b"], "label_token_ids": [10, 20]},
    "/inference/v1/generate": {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 4}},
    "/v1/completions/render": {"prompt": "Hello"},
    "/v1/chat/completions/render": {"messages": CHAT},
    "/v1/responses/render": {"input": "Hello"},
    "/v1/messages/render": {"messages": CHAT, "max_tokens": 4},
    "/v1/systemone": {"messages": CHAT},
}
HONOURING = [path for path in BODIES if not ROUTES[path].express]
STREAMING = [p for p in HONOURING if not p.endswith("/batch") and p != "/generative_scoring"]
SPELLINGS = {"express": "express.", "vllm_xargs": "express_"}
server_test = pytest.mark.server


def spelled(spelling, **fields):
    if spelling == "express":
        return {"express": fields}
    return {"vllm_xargs": {f"express_{name}": value for name, value in fields.items()}}


def post(server, path, **more):
    return server.client.post(path, json={"model": "small", **BODIES[path], **more})


def test_the_documentation_has_the_table():
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    assert markdown() in page, "python -m express_vllm.server.table prints what belongs there"


def test_routes_that_nobody_decided_about_refuse_budgets():
    found = decision("/v1/new")
    assert found.express and found.xargs
    assert not WITHOUT_BUDGET & set(ROUTES)


@server_test
def test_every_route_that_takes_a_body_is_decided(server):
    """A route that vLLM adds fails here until somebody has looked at it."""
    paths = server.client.get("/openapi.json").json()["paths"]
    posts = {path for path, methods in paths.items() if set(methods) & {"post", "put", "patch"}}
    assert posts - {"/v1/express/plan"} - WITHOUT_BUDGET == set(BODIES)
    assert set(BODIES) <= set(ROUTES)


@server_test
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("path", HONOURING)
def test_a_budget_is_honoured(server, path, spelling):
    """What was granted is in the answer's usage: the edge's word, not what was asked for."""
    answer = post(server, path, **spelled(spelling, memory_tokens=256, seed=3))
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["express"]["memory_tokens"] == 256


@server_test
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("path", HONOURING)
def test_a_bad_budget_is_refused(server, quick, path, spelling):
    """Of the second the length must be known: vLLM has started its answer by then."""
    least = quick.size().tokens(128)
    for name, value, words in (
        ("memory_tokens", 12, f"from {least} to 8192"),
        ("memory", "1KiB", f"{least} to 8192 tokens"),
    ):
        for stream in (False, True) if path in STREAMING else (False,):
            more = {"stream": True} if stream else {}
            answer = post(server, path, **spelled(spelling, **{name: value}), **more)
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            assert error["param"] == SPELLINGS[spelling] + name
            assert words in error["message"]


@server_test
@pytest.mark.parametrize("path", STREAMING)
def test_streams_say_what_was_used(server, path):
    options = {} if "messages" in str(BODIES[path]) and path == "/v1/messages" else {
        "stream_options": {"include_usage": True}
    }  # fmt: skip
    if path == "/v1/responses":
        options = {}
    answer = post(server, path, express={"memory_tokens": 256}, stream=True, **options)
    assert answer.status_code == 200, answer.text
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line[:7] == "data: {"]
    usages = [event.get("usage") or event.get("response", {}).get("usage") for event in events]
    (found,) = [usage["express"] for usage in usages if usage and "express" in usage]
    assert found["memory_tokens"] == 256 and found["sequences"] == 1
    assert "express" in (usages[-1] or usages[-2]), "in the last event that has usage"


@server_test
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("path", [p for p in BODIES if ROUTES[p].express])
def test_other_routes_refuse_a_budget_or_pass_it_on(server, path, spelling):
    answer = post(server, path, **spelled(spelling, memory_tokens=256))
    if reason := decision(path).refuses(spelling):
        assert answer.status_code == 400 and reason in answer.json()["error"]["message"]
    else:
        assert answer.status_code == 200
        (found,) = [part["sampling_params"] for part in _list(answer.json())]
        assert found["extra_args"] == {"express_memory_tokens": 256}


def _list(content):
    return content if isinstance(content, list) else [content]


@server_test
@pytest.mark.parametrize("path", HONOURING)
def test_beam_search_is_refused(server, path):
    answer = post(server, path, use_beam_search=True)
    assert answer.status_code == 400
    assert "use_beam_search" in answer.json()["error"]["message"]


@server_test
def test_sampling_parameters_may_carry_the_budget(server):
    sampling = {"max_tokens": 4, "extra_args": {"express_memory_tokens": 256}}
    answer = post(server, "/inference/v1/generate", sampling_params=sampling)
    assert answer.json()["usage"]["express"]["memory_tokens"] == 256
    answer = post(
        server, "/inference/v1/generate", sampling_params=sampling, express={"memory_tokens": 300}
    )
    assert answer.status_code == 400
    assert "sampling_params.extra_args" in answer.json()["error"]["message"]


# --- answers that are kept ----------------------------------------------------------------------


def kept(server, name):
    """The stored answer, when it has ended."""
    for _ in range(600):
        answer = server.client.get(f"/v1/responses/{name}")
        if answer.status_code != 200 or answer.json()["status"] not in ("queued", "in_progress"):
            return answer
        time.sleep(0.1)
    raise TimeoutError(answer.text)


@server_test
@pytest.mark.parametrize("background", [False, True])
def test_a_stored_answer_says_what_was_used(server, background):
    more = {"store": True, "background": background}
    answer = post(server, "/v1/responses", express={"memory_tokens": 256}, **more).json()
    found = kept(server, answer["id"]).json()
    assert found["usage"]["express"]["memory_tokens"] == 256
    if not background:
        assert found["usage"] == answer["usage"]


@server_test
def test_the_events_of_a_background_answer_say_it_too(server):
    more = {"store": True, "background": True, "stream": True}
    answer = post(server, "/v1/responses", express={"memory_tokens": 256}, **more)
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line[:6] == "data: "]
    assert events[-1]["response"]["usage"]["express"]["memory_tokens"] == 256
    name = events[-1]["response"]["id"]
    again = server.client.get(f"/v1/responses/{name}", params={"stream": True}).text
    assert again == answer.text


@server_test
@pytest.mark.parametrize("stream", [False, True])
def test_a_background_answer_is_refused_at_once_and_not_kept(server, stream):
    """vLLM would say that it is queued, for ever."""
    more = {"store": True, "background": True, "stream": stream, "request_id": f"resp_no{stream}"}
    answer = post(server, "/v1/responses", express={"memory": "1KiB"}, **more)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "express.memory"
    assert server.client.get(f"/v1/responses/resp_no{stream}").status_code == 404


# --- prompt embeddings --------------------------------------------------------------------------


def embeddings(rows, size):
    buffer = io.BytesIO()
    torch.save(torch.zeros(rows, size, dtype=torch.bfloat16), buffer)
    return base64.b64encode(buffer.getvalue()).decode()


@server_test
def test_prompt_embeddings_have_a_length(server, quick):
    """A request that the engine would not take must not reach it."""
    body = {
        "model": "small", "max_tokens": 16, "ignore_eos": True,
        "prompt_embeds": embeddings(200, quick.hidden_size),
    }  # fmt: skip
    size = quick.size()
    least = size.tokens(128)
    exact = {"express_mode": "exact", "express_memory_tokens": least}
    answer = server.client.post("/v1/completions", json=body | {"vllm_xargs": exact})
    assert answer.status_code == 400
    assert "216 tokens" in answer.text and f"memory of {least} keeps 128" in answer.text
    answer = server.client.post(
        "/v1/completions", json=body | {"express": {"memory_tokens": least}}
    )
    assert answer.status_code == 200, answer.text
    found = answer.json()["usage"]["express"]
    assert found["exact_kv_tokens"] == 215 and found["peak_kv_tokens"] == least
    wait_for_rest(server)


# --- other servers ------------------------------------------------------------------------------


@server_test
@pytest.mark.ops
def test_a_length_that_the_engine_fits_is_the_limit_everywhere(model_path, tmp_path):
    more = ("--max-model-len", "auto", "--num-gpu-blocks-override", "28", "--enable-scale-out")
    limits = ("--additional-config", "{}")
    with serve(model_path, tmp_path / "log.txt", *more, *limits) as server:
        config = server.client.get("/v1/express/config").json()
        fitted = config["limits"]["max_model_len"]
        most = WIDE.tokens(fitted)  # of a request that keeps every token
        assert fitted < 8192 and config["limits"]["max_memory_tokens"] == most
        assert config["fields"]["memory_tokens"]["anyOf"][0]["maximum"] == most
        for path in HONOURING:
            for spelling in SPELLINGS:
                answer = post(server, path, **spelled(spelling, memory_tokens=most + 1))
                assert answer.status_code == 400 and f"to {most} " in answer.text
            answer = post(server, path, express={"memory_tokens": most})
            assert answer.status_code == 200, answer.text
        plan = {"prompt_tokens": fitted, "max_tokens": 1}
        answer = server.client.post("/v1/express/plan", json=plan)
        assert answer.status_code == 400 and f"is {fitted} " in answer.text


@server_test
@pytest.mark.ops
def test_a_short_model_has_a_configuration(model_path, tmp_path):
    limits = ("--max-model-len", "100", "--additional-config", "{}")
    with serve(model_path, tmp_path / "log.txt", *limits) as server:
        answer = server.client.get("/v1/express/config")
        assert answer.status_code == 200 and answer.json()["shape"] is None
        answer = post(server, "/v1/completions")
        assert answer.json()["usage"]["express"]["compactions"] == 0
        plan = server.client.post("/v1/express/plan", json={"prompt_tokens": 50, "max_tokens": 50})
        assert plan.json()["compression_ratio"] == round(99 / WIDE.tokens(99), 4)


@server_test
@pytest.mark.ops
def test_the_lines_of_a_batch_have_budgets(model_path, tmp_path):
    fields = {
        "plain": {}, "object": {"express": {"memory_tokens": 256}},
        "xargs": {"vllm_xargs": {"express_memory_tokens": 300}},
        "bad": {"express": {"memory_tokens": 12}}, "late": {"express": {"memory": "1KiB"}},
        "beam": {"use_beam_search": True}, "unknown": {"express": {"/a" * 8000: 1}},
    }  # fmt: skip
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/chat/completions",
         "body": {"model": "small", "messages": CHAT, "max_tokens": 4, **more}}
        for name, more in fields.items()
    ]  # fmt: skip
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(json.dumps(line) for line in lines))
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "run-batch", "-i", str(source),
        "-o", str(target), "--model", str(model_path), "--served-model-name", "small",
        "--attention-backend", "express", "--enforce-eager", "--max-model-len", "2048",
    ]  # fmt: skip
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(command, text=True, capture_output=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found = {r["custom_id"]: r for r in map(json.loads, target.read_text().splitlines())}
    memory = {
        name: found[name]["response"]["body"]["usage"]["express"]["memory_tokens"]
        for name in ("plain", "object", "xargs")
    }
    assert memory == {"plain": 2048, "object": 256, "xargs": 300}
    for name, param in {
        "bad": "express.memory_tokens", "late": "express.memory", "beam": "use_beam_search",
    }.items():  # fmt: skip
        error = found[name]["error"]["error"]
        assert found[name]["response"]["status_code"] == 400 and error["param"] == param
    assert len(json.dumps(found["unknown"])) < 1500
