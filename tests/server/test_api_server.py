"""The request API on a real server: the OpenAI client, streams, refusals, plans, other routes."""

from __future__ import annotations

import json
import math
import threading

import httpx
import openai
import pytest
from serving import BLOCK_SIZE, BLOCKS, watch

pytestmark = pytest.mark.server
CHAT = [{"role": "user", "content": "What is 2+2?"}]


@pytest.fixture(scope="module")
def size(quick):
    return quick.size(2, "bfloat16")


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", timeout=300, max_retries=0)


@pytest.fixture(scope="module")
def long_prompt(tokens):
    """1,500 tokens of real text."""
    return tokens[:1500]


def post(server, route, express, **more):
    body = {"model": "small", "express": express}
    if route == "completions":
        body |= {"prompt": "Hello", "max_tokens": 4}
    elif route == "chat/completions":
        body |= {"messages": CHAT, "max_tokens": 4}
    else:
        body |= {"input": "Hello", "max_output_tokens": 4}
    return server.client.post(f"/v1/{route}", json=body | more)


def used(usage):
    """`usage.express` of an answer of the OpenAI client, which knows no such field."""
    return usage.model_extra["express"]


# --- the OpenAI client --------------------------------------------------------------------------


def test_completions_report_what_the_cache_held(server, client, size, long_prompt):
    """The same numbers as the engine's own blocks and metrics."""
    names = (
        "peak_kv_tokens_sum",
        "compactions_total",
        "tokens_thinned_total",
        "compaction_seconds_sum",
    )
    before = {name: server.metric(f"vllm:express_{name}") for name in names}
    done, seen = threading.Event(), []
    watcher = threading.Thread(target=watch, args=(server, done, seen))
    watcher.start()
    answer = client.completions.create(
        model="small", prompt=long_prompt, max_tokens=100, temperature=0,
        extra_body={"express": {"memory_tokens": 512, "seed": 7}, "ignore_eos": True},
    )  # fmt: skip
    done.set()
    watcher.join()
    found = used(answer.usage)
    peak = size.tokens(size.slots(512))
    assert found == {
        "mode": "express", "memory_tokens": 512, "pinned_tokens": 4,
        "peak_kv_tokens": peak, "exact_kv_tokens": 1599,
        "compactions": found["compactions"], "compression_ratio": round(1599 / peak, 4),
        "sequences": 1,
    }  # fmt: skip
    assert found["compactions"] > 10
    assert max(seen) == math.ceil(size.slots(peak) / BLOCK_SIZE)
    assert server.metric("vllm:express_peak_kv_tokens_sum") - before["peak_kv_tokens_sum"] == peak
    more = server.metric("vllm:express_compactions_total") - before["compactions_total"]
    assert more == found["compactions"]
    thinned = server.metric("vllm:express_tokens_thinned_total") - before["tokens_thinned_total"]
    assert 1599 - 512 <= thinned < 1599, "what was not held any more at the end"
    seconds = server.metric("vllm:express_compaction_seconds_sum")
    assert seconds > before["compaction_seconds_sum"], "measured in the worker's process"


def test_the_object_and_vllm_xargs_give_the_same_answer(client, long_prompt):
    def text(**extra):
        answer = client.completions.create(
            model="small", prompt=long_prompt[:900], max_tokens=12, temperature=0, extra_body=extra
        )
        return answer.choices[0].text, used(answer.usage)

    fields = {"memory_tokens": 256, "profile": "even", "seed": 3}
    by_object = text(express=fields)
    assert by_object == text(vllm_xargs={f"express_{k}": v for k, v in fields.items()})
    assert by_object[1]["compactions"] > 0


def test_chat_streams_report_in_the_last_chunk(client, size):
    memory = f"{300 * size.bytes_per_token // 1024}KiB"

    def chunks(**options):
        return list(
            client.chat.completions.create(
                model="small", messages=CHAT, max_tokens=6, temperature=0, stream=True,
                extra_body={"express": {"memory": memory}}, **options,
            )
        )  # fmt: skip

    with_usage = chunks(stream_options={"include_usage": True})
    assert [chunk.usage for chunk in with_usage[:-1]] == [None] * (len(with_usage) - 1)
    found = used(with_usage[-1].usage)
    assert found["memory_tokens"] == 300
    assert found["exact_kv_tokens"] == with_usage[-1].usage.total_tokens - 1
    assert found["peak_kv_tokens"] == size.tokens(found["exact_kv_tokens"])
    assert all(chunk.usage is None for chunk in chunks()), "only who asks for usage gets it"


def test_responses_report_too(client):
    arguments = {
        "model": "small", "input": "Say hello.", "max_output_tokens": 6, "temperature": 0,
        "extra_body": {"express": {"memory_tokens": 256}},
    }  # fmt: skip
    whole = client.responses.create(**arguments)
    events = list(client.responses.create(stream=True, **arguments))
    last = events[-1].response
    assert events[-1].type == "response.completed"
    assert used(last.usage) == used(whole.usage)
    assert used(whole.usage)["exact_kv_tokens"] == whole.usage.total_tokens - 1


def system(words):
    return {"role": "system", "content": " ".join(["Answer in one word."] * words)}


def ids(server, messages, **more):
    """The tokens of a conversation, as the server makes them."""
    body = {"model": "small", "messages": messages, **more}
    return server.client.post("/tokenize", json=body).json()["tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_system_message_is_pinned(server, client, stream):
    """What it takes, on the grid; the rest of the conversation is thinned."""
    messages = [system(20), {"role": "user", "content": "Count. " + "one two " * 400}]
    front = len(ids(server, messages[:1], add_generation_prompt=False))
    assert ids(server, messages)[:front] == ids(
        server, messages[:1], add_generation_prompt=False
    )  # fmt: skip
    asked = {"memory_tokens": 512, "pinned_tokens": "system"}
    answer = client.chat.completions.create(
        model="small", messages=messages, max_tokens=4, stream=stream,
        extra_body={"express": asked},
        **({"stream_options": {"include_usage": True}} if stream else {}),
    )  # fmt: skip
    found = used((list(answer)[-1] if stream else answer).usage)
    assert found["pinned_tokens"] == -(-front // 16) * 16 > 100
    assert found["compactions"] > 0
    counted = client.chat.completions.create(
        model="small", messages=messages, max_tokens=4,
        extra_body={"express": asked | {"pinned_tokens": front}},
    )  # fmt: skip
    assert used(counted.usage) == found


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [{"role": "developer", "content": "Be kind."}, *CHAT]}),
        ("responses", {"instructions": "Be kind.", "input": "What is 2+2?"}),
        ("messages", {"system": "Be kind.", "messages": CHAT}),
    ],
)  # fmt: skip
def test_every_chat_route_may_pin_its_system_message(server, path, body):
    """Short ones, of which all is kept."""
    limit = "max_output_tokens" if path == "responses" else "max_tokens"
    sent = {"model": "small", limit: 2, "express": {"pinned_tokens": "system"}, **body}
    answer = server.client.post(f"/v1/{path}", json=sent)
    assert answer.status_code == 200, answer.text
    found = answer.json()["usage"]["express"]
    assert found["pinned_tokens"] == found["exact_kv_tokens"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": CHAT, "max_tokens": 2}),
        ("responses", {"input": "Hello", "max_output_tokens": 2}),
        ("messages", {"messages": CHAT, "max_tokens": 2, "thinking": {"type": "disabled"}}),
    ],
)
def test_no_system_message_is_said(server, path, body, stream):
    sent = {"model": "small", **body, "stream": stream, "express": {"pinned_tokens": "system"}}
    answer = server.client.post(f"/v1/{path}", json=sent)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "express.pinned_tokens"
    assert "does not begin with a system or developer message" in answer.text


def test_the_word_system_is_for_chat_routes(server):
    for body in (
        {"express": {"pinned_tokens": "system"}},
        {"vllm_xargs": {"express_pinned_tokens": "system"}},
    ):
        sent = {"model": "small", "prompt": "Hello", "max_tokens": 2, **body}
        answer = server.client.post("/v1/completions", json=sent)
        assert answer.status_code == 400 and "must be an integer here" in answer.text
    answer = server.client.post(
        "/v1/chat/completions",
        json={"model": "small", "messages": [system(1), *CHAT], "max_tokens": 2,
              "vllm_xargs": {"express_pinned_tokens": "system"}},
    )  # fmt: skip
    assert answer.status_code == 400
    assert "express_pinned_tokens='system' is not allowed" in answer.text


def test_a_pin_without_room_says_what_has_it(server, size):
    long = {"prompt": [5] * 3000, "model": "small", "max_tokens": 4}
    asked = {"memory_tokens": 512, "pinned_tokens": 1000}
    answer = server.client.post("/v1/completions", json=long | {"express": asked})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "express.pinned_tokens"
    least = int(error["message"].partition(" (param")[0].rpartition(" ")[2])
    asked["memory_tokens"] = least
    answer = server.client.post("/v1/completions", json=long | {"express": asked})
    found = answer.json()["usage"]["express"]
    assert found["memory_tokens"] == least and found["pinned_tokens"] == 1024
    plan = {"prompt_tokens": 3000, "max_tokens": 4, "express": asked}
    planned = server.client.post("/v1/express/plan", json=plan).json()
    assert planned["pinned_tokens"] == 1024 and planned["peak_kv_tokens"] == found["peak_kv_tokens"]
    fields = server.client.get("/v1/express/config").json()["fields"]
    assert {"const": "system", "type": "string"} in fields["pinned_tokens"]["anyOf"]


def test_several_sequences_are_added_up(client):
    answer = client.completions.create(
        model="small", prompt=["Hello", "One two three"], n=2, max_tokens=5,
        extra_body={"express": {"memory_tokens": 256}, "ignore_eos": True},
    )  # fmt: skip
    found = used(answer.usage)
    assert found["sequences"] == 4
    # Two prompts, each in two sequences, every one without its last token.
    assert found["exact_kv_tokens"] == 2 * answer.usage.prompt_tokens + 20 - 4


# --- the prefix cache ---------------------------------------------------------------------------


def counted(server):
    """Tokens looked up and found in the prefix cache, and compactions run, as the engine counts."""
    names = ("prefix_cache_queries", "prefix_cache_hits", "express_compactions")
    return [server.metric(f"vllm:{name}_total") for name in names]


def complete(server, prompt, max_tokens, **more):
    """-> the answer's usage and tokens, and what the engine counted meanwhile."""
    body = {
        "model": "small", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True,
        "return_token_ids": True, "express": {"memory_tokens": 256}, **more,
    }  # fmt: skip
    before = counted(server)
    answer = server.client.post("/v1/completions", json=body).json()
    counts = [int(now - then) for now, then in zip(counted(server), before, strict=True)]
    return answer["usage"], answer["choices"][0]["token_ids"], counts


def test_a_second_turn_says_how_much_of_it_was_cached(server, tokens):
    """All that the first turn stored: its last token never is."""
    first, answered, counts = complete(server, tokens[4000:4900], 10)
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert counts == [900, 0, first["express"]["compactions"]]
    prompt = [*tokens[4000:4900], *answered, *tokens[9000:9300]]
    second, _, counts = complete(server, prompt, 10)
    assert second["prompt_tokens_details"]["cached_tokens"] == 909
    assert counts == [len(prompt), 909, second["express"]["compactions"]]
    plan = {"prompt_tokens": len(prompt), "max_tokens": 10, "express": {"memory_tokens": 256}}
    planned = server.client.post("/v1/express/plan", json=plan).json()
    done = [usage["express"]["compactions"] for usage in (first, second)]
    assert planned["compactions"] == sum(done) > done[0] > 0
    assert planned["peak_kv_tokens"] == second["express"]["peak_kv_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_sequences_of_one_prompt_compute_it_once(server, tokens, stream):
    """vLLM says of one sequence how much was cached; usage has the compactions of each."""
    prompt = tokens[12000 + 6000 * stream :][:6000]
    body = {"n": 3, "temperature": 1.0}
    if stream:
        body = {
            "model": "small", "prompt": prompt, "max_tokens": 9, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}, "express": {"memory_tokens": 256}, **body,
        }  # fmt: skip
        before = counted(server)
        text = server.client.post("/v1/completions", json=body).text
        (event,) = [line for line in text.splitlines() if '"usage":{' in line]
        usage = json.loads(event[6:])["usage"]
        counts = [int(now - then) for now, then in zip(counted(server), before, strict=True)]
    else:
        usage, _, counts = complete(server, prompt, 9, **body)
    queries, hits, compactions = counts
    assert usage["express"]["sequences"] == 3 and queries == 18000
    assert hits > 2 * 5900
    assert compactions == usage["express"]["compactions"]
    plan = {"prompt_tokens": 6000, "max_tokens": 9, "express": {"memory_tokens": 256}}
    once = server.client.post("/v1/express/plan", json=plan).json()["compactions"]
    assert once <= compactions < 1.1 * once


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_refusals_are_openais_errors_and_counted_also_for_streams(server, size, stream):
    """That every route refuses is in test_api_routes.py, every reason in test_budget.py."""
    before = server.client.get("/metrics").text
    answer = post(server, "completions", {"memory_tokens": 12}, stream=stream)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "express.memory_tokens" and error["code"] == 400
    assert error["type"] == "BadRequestError"
    assert (
        "express.memory_tokens=12 is not allowed: it must be an integer "
        f"from {size.tokens(128)} to 8192" in error["message"]
    )
    name = (
        'vllm:express_refused_requests_total{engine="0",model_name="small",reason="memory_tokens"}'
    )
    assert count(server.client.get("/metrics").text, name) == count(before, name) + 1


def count(text, name):
    (line,) = [line for line in text.splitlines() if line.startswith(name)]
    return float(line.rsplit(" ", 1)[1])


def test_a_budget_in_both_places_names_both(server):
    answer = post(server, "completions", {"seed": 1}, vllm_xargs={"express_seed": 1})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "express=" in message and "express_seed" in message and "vllm_xargs" in message


def test_exact_requests_that_could_grow_beyond_the_limit_say_so(server):
    body = {"prompt_tokens": 8000, "max_tokens": 100, "express": {"mode": "exact", "memory": "50%"}}
    answer = server.client.post("/v1/express/plan", json=body)
    assert answer.status_code == 400
    assert "express.mode='exact'" in answer.json()["error"]["message"]


# --- express's own routes -----------------------------------------------------------------------


def test_the_configuration_is_the_servers(server, quick, size):
    config = server.client.get("/v1/express/config").json()
    assert config["defaults"]["memory_tokens"] == 1024
    assert config["limits"]["max_memory_tokens"] == 8192
    assert config["bytes_per_token"] == size.bytes_per_token
    assert config["wide"] == {"layers": [*quick.wide_layers], "factor": quick.wide_factor}
    assert config["pool"]["blocks"] == BLOCKS - 1 and config["pool"]["block_size"] == BLOCK_SIZE
    memory = config["fields"]["memory_tokens"]["anyOf"][0]
    assert (memory["minimum"], memory["maximum"]) == (size.tokens(128), 8192)


def test_a_plan_is_what_then_happens(server, client, size, long_prompt):
    body = {"prompt_tokens": 900, "max_tokens": 8, "express": {"memory_tokens": 256}}
    plan = server.client.post("/v1/express/plan", json=body).json()
    answer = client.completions.create(
        model="small", prompt=long_prompt[:900], max_tokens=8, temperature=0,
        extra_body={"express": {"memory_tokens": 256}, "ignore_eos": True},
    )  # fmt: skip
    found = used(answer.usage)
    for name in ("peak_kv_tokens", "exact_kv_tokens", "compactions", "compression_ratio"):
        assert plan[name] == found[name]
    blocks = math.ceil(size.slots(256) / BLOCK_SIZE)
    assert plan["blocks"] == {"planned": blocks, "exact": 15}
    assert plan["concurrent_requests"]["planned"] == (BLOCKS - 1) // blocks
    assert plan["bytes"]["planned"] == found["peak_kv_tokens"] * size.bytes_per_token
    assert plan["bytes"]["planned"] <= 256 * size.bytes_per_token


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt_tokens": 0}, ["prompt_tokens"]),
        ({"prompt_tokens": "10"}, ["prompt_tokens", "integer"]),
        ({"prompt_tokens": 8000, "max_tokens": 500}, ["prompt_tokens=8000", "8500", "8192"]),
        ({"prompt_tokens": 10**12}, ["prompt_tokens", "8192"]),
        ({"prompt_tokens": 10**30}, ["prompt_tokens", "less than or equal"]),
        ({"prompt_tokens": 10, "express": {"seed": 1.5}}, ["express.seed=1.5"]),
        ({"prompt_tokens": 10, "expres": {}}, ["expres"]),
        ({}, ["prompt_tokens"]),
        ([], []),
    ],
)  # fmt: skip
def test_bad_plans_are_refused(server, body, words):
    answer = server.client.post("/v1/express/plan", json=body)
    assert answer.status_code == 400, answer.text
    for word in words:
        assert word in answer.json()["error"]["message"]


def test_recent_requests_are_listed_without_their_text(server, size):
    answer = post(server, "completions", {"memory_tokens": 300}, prompt="a secret prompt")
    status = server.client.get("/v1/express/status")
    assert "secret" not in status.text and answer.json()["choices"][0]["text"] not in status.text
    slots = (BLOCKS - 1) * BLOCK_SIZE
    newest = status.json()["requests"][0]
    assert newest["route"] == "/v1/completions" and not newest["running"]
    assert newest["usage"] == answer.json()["usage"]["express"]
    assert status.json()["kv_tokens"] == slots * (size.layers + size.extra) // size.layers


# --- everything else is vLLM's ------------------------------------------------------------------


def test_the_schema_has_the_object_and_everything_of_vllms(server):
    schema = server.client.get("/openapi.json").json()
    paths = schema["paths"]
    for path in ("/v1/models", "/tokenize", "/v1/messages", "/v1/responses/{response_id}"):
        assert path in paths, f"vLLM's {path} is gone"
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses"):
        body = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        model = schema["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]]
        options = model["properties"]["express"]["anyOf"]
        (fields,) = [o for o in options if "$ref" in o]
        found = schema["components"]["schemas"][fields["$ref"].rsplit("/", 1)[1]]
        assert found["properties"]["memory_tokens"]["anyOf"][0]["maximum"] == 8192
        assert "temperature" in str(model["properties"].keys()) and "model" in model["properties"]


def test_vllms_other_routes_work(server):
    assert server.client.get("/v1/models").json()["data"][0]["id"] == "small"
    assert server.client.get("/version").status_code == 200
    tokens = server.client.post("/tokenize", json={"model": "small", "prompt": "Hello"}).json()
    assert tokens["count"] == 1
    body = {"model": "small", "max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]}
    assert server.client.post("/v1/messages", json=body).json()["usage"]["output_tokens"] == 4
    wrong = httpx.post(f"{server.url}/v1/completions", content=b"{}", timeout=60)
    assert wrong.status_code == 400, "the content type is checked as before"
