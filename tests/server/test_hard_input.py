"""Hostile and broken requests to a real server: clear errors, no leaked block, server alive."""

from __future__ import annotations

import json
import re
import socket
import time

import httpx
import pytest
from serving import body, wait_for_rest

pytestmark = pytest.mark.server
ROUTES = ["completions", "chat/completions", "responses"]
MEGABYTE = 10**6


def send(server, route, content):
    return server.client.post(
        f"/v1/{route}", content=content, headers={"Content-Type": "application/json"}
    )


NASTY = {
    "huge": ('{"memory_tokens": 1e400}', "express.memory_tokens"),
    "huge integer": ('{"memory_tokens": ' + "9" * 4000 + "}", "express.memory_tokens"),
    "more digits than Python reads": ('{"seed": ' + "9" * 5000 + "}", ""),
    "negative": ('{"memory_tokens": -1}', "express.memory_tokens"),
    "NaN": ('{"memory_tokens": NaN}', "express.memory_tokens"),
    "infinite": ('{"seed": -Infinity}', "express.seed"),
    "float": ('{"memory_tokens": 512.0}', "express.memory_tokens"),
    "string": ('{"memory_tokens": "512"}', "express.memory_tokens"),
    "boolean": ('{"compute_tokens": true}', "express.compute_tokens"),
    "list": ('{"memory_tokens": [512]}', "express.memory_tokens"),
    "nested": ('{"memory_tokens": {"memory_tokens": {"seed": 1}}}', "express.memory_tokens"),
    "not an object": ("[]", "express"),
    "text": ('"express"', "express"),
    "unknown": ('{"memory_token": 512}', "express.memory_token"),
    "empty name": ('{"": 1}', "express."),
    "twice": ('{"seed": 1, "seed": 2}', "express.seed"),
    "object twice": ('{}, "express": {"seed": 1}', "express"),
    "null byte": ('{"mode": "exact\\u0000"}', "express.mode"),
    "lone surrogate": ('{"mode": "\\ud800"}', "express.mode"),
    "ten megabytes": ('{"memory": "' + "9" * 10 * MEGABYTE + '%"}', "express.memory"),
    "a million keys": (
        "{" + ", ".join(f'"k{i}": 1' for i in range(10**5)) + "}", "express.k0",
    ),
    "deep": ('{"seed": ' + "[" * 10**5 + "]" * 10**5 + "}", ""),
    "not a share": ('{"memory": "1e999%"}', "express.memory"),
    "no JSON": ('{"seed": ', ""),
    "a path of 16 KB": (
        '{"' + "/a" * 8000 + '": 1}', "express." + "/a" * 28 + "... (16008 characters)",
    ),
    "a line of a log": ('{"a\\nINFO a line": 1}', "express.a\\nINFO a line"),
}  # fmt: skip


@pytest.mark.parametrize("name", NASTY)
def test_nasty_objects_are_refused_clearly(server, name):
    express, parameter = NASTY[name]
    for route in ROUTES:
        answer = send(server, route, body(route, express))
        assert answer.status_code == 400, f"{route}: {answer.status_code} {answer.text[:300]}"
        error = answer.json()["error"]
        if parameter:
            assert error["param"] == parameter
            assert f"{parameter}=" in error["message"] and "allowed" in error["message"]
        assert len(answer.content) <= 1000, "an error does not send the input back"


def test_a_prompt_of_ten_megabytes_is_refused(server):
    content = json.dumps({"model": "small", "prompt": "word " * 2 * MEGABYTE, "max_tokens": 1})
    assert send(server, "completions", content).status_code == 400


@pytest.mark.parametrize("route", ROUTES)
def test_unknown_models_are_not_found(server, route):
    content = body(route, '{"memory_tokens": 256}').replace('"small"', '"large"', 1)
    answer = send(server, route, content)
    assert answer.status_code == 404 and "large" in answer.json()["error"]["message"]


def test_the_operators_limit_holds_on_every_way_in(server):
    """8,192 slots is this server's most, whatever a client's schema allows."""
    for extra in (
        {"express": {"memory_tokens": 8193}}, {"express": {"memory": "1GiB"}},
        {"vllm_xargs": {"express_memory_tokens": 8193}}, {"vllm_xargs": {"express_memory": "1GiB"}},
    ):  # fmt: skip
        answer = server.client.post(
            "/v1/completions", json={"model": "small", "prompt": "Hi", "max_tokens": 1, **extra}
        )
        assert answer.status_code == 400 and "8192" in answer.json()["error"]["message"]
    messages = [{"role": "user", "content": "Hi"}]
    content = {
        "model": "small", "max_tokens": 1, "messages": messages,
        "vllm_xargs": {"express_memory_tokens": 8193},
    }  # fmt: skip
    assert server.client.post("/v1/messages", json=content).status_code == 400


#: What vLLM and pydantic would repeat: names of models, fields and keys, and values.
PATH = "/a" * 8000
LONG = {
    "the model": {"model": PATH},
    "a field": {PATH: 1},
    "a key of a field": {"logit_bias": {PATH: "x"}, "vllm_xargs": {PATH: {}}},
    "a value": {"max_tokens": PATH, "temperature": PATH, "messages": PATH, "input": [PATH]},
    "a list": {"stop": [[PATH]] * 100, "messages": [{PATH: PATH}] * 100},
    "lines": {"model": "small\nINFO a line that was never logged"},
    "both places": {"express": {"seed": 1}, "vllm_xargs": {f"express_{PATH}": 1}},
    "vllm_xargs": {"vllm_xargs": {f"express_{PATH}": 1}},
    "beam search": {"use_beam_search": PATH},
    "nested": {"express": {"memory": [[[PATH]]]}},
    "text": {"express": PATH},
    "a template": {"chat_template": PATH, "messages": [{"role": PATH, "content": "Hi"}]},
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_long_names_do_not_come_back(server, name):
    """Whatever is wrong with 16 KB of a body."""
    for route in (*ROUTES, "messages", "express/plan", "/invocations", "/generative_scoring"):
        content = json.loads(body(route, "null") if route in ROUTES else "{}") | LONG[name]
        path = route if route.startswith("/") else f"/v1/{route}"
        answer = server.client.post(path, json=content)
        if answer.status_code == 200:
            assert name in ("a field", "a template"), "only vLLM's own models take what is unknown"
            continue
        assert answer.status_code in (400, 404), answer.text[:300]
        assert len(answer.content) <= 1000, answer.text
        param = answer.json()["error"].get("param") or ""
        assert "\n" not in param


@pytest.mark.slow
def test_long_names_do_not_stop_the_server(server):
    """That messages are cut before vLLM cleans them is in test_api_errors.py."""
    start = time.monotonic()
    assert server.client.post("/v1/completions", json={"model": PATH}).status_code == 404
    assert time.monotonic() - start < 2, "cubic cleaning takes 17 s"


@pytest.mark.parametrize("route", ROUTES)
def test_disconnects_in_the_middle_of_a_stream_leave_nothing(server, route):
    content = json.loads(body(route, '{"memory_tokens": 256}'))
    for name in ("max_tokens", "max_output_tokens"):
        if name in content:
            content[name] = 2000
    content |= {"stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/{route}", json=content, timeout=300) as stream:
        assert stream.status_code == 200
        for number, line in enumerate(stream.iter_lines()):
            if number > 20 and line:
                break
    wait_for_rest(server)


def test_connections_cut_inside_the_body_leave_nothing(server):
    host, port = server.url.removeprefix("http://").split(":")
    for _ in range(5):
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b'Content-Length: 500\r\n\r\n{"model": "small", "express": {'
            )
    wait_for_rest(server)


def test_the_server_is_alive_after_all_this(server):
    answer = send(server, "completions", body("completions", '{"memory_tokens": 256}'))
    assert answer.status_code == 200
    assert "usage" in answer.json() and "express" in answer.json()["usage"]
    served = re.findall(r'"(?:GET|POST) [^"]*" (\d+)', server.log.read_text())
    assert served and not [code for code in served if code >= "500"]
    wait_for_rest(server)
