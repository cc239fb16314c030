"""Two API servers over one engine, with an API key: everything is there, guarded as vLLM's is."""

from __future__ import annotations

import httpx
import pytest
from browser import Browser
from serving import BLOCKS, body, serve, wait_for_rest

pytestmark = [pytest.mark.server, pytest.mark.ops]
KEY = "sesame"


@pytest.fixture(scope="module")
def pair(model_path, tmp_path_factory):
    log = tmp_path_factory.mktemp("pair") / "log.txt"
    arguments = ("--api-server-count", "2", "--api-key", KEY)
    headers = {"Authorization": f"Bearer {KEY}"}
    with serve(model_path, log, *arguments, headers=headers) as running:
        yield running


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"), ("GET", "/v1/express/config"), ("GET", "/v1/express/status"),
        ("POST", "/v1/express/plan"), ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"), ("POST", "/v1/responses"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", [None, "wrong"])
def test_without_the_key_nothing_is_told(pair, method, path, key):
    """Not even whether the body is right: vLLM's own answer comes first."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    content = b'{"express": {"seed": 1, "seed": 2}' if method == "POST" else None
    answer = httpx.request(
        method, pair.url + path, content=content,
        headers={"Content-Type": "application/json", **headers}, timeout=60,
    )  # fmt: skip
    assert answer.status_code == 401 and answer.json() == {"error": "Unauthorized"}


def test_the_page_is_open_but_asks_for_the_key(pair):
    with Browser() as page:
        page.open(f"{pair.url}/express")
        state = "document.getElementById('state').textContent"
        assert "API key" in page.until(f"{state}.includes('API key') && {state}")
        page.run("document.querySelector('details').open = true")
        page.run("document.getElementById('key').focus()")
        page.type(KEY)
        page.until(f"{state} === 'connected'")


def test_both_servers_know_the_pool(pair):
    headers = {"Authorization": f"Bearer {KEY}"}
    for _ in range(8):  # a connection each, so that both are asked
        config = httpx.get(f"{pair.url}/v1/express/config", headers=headers, timeout=60).json()
        assert config["pool"]["blocks"] == BLOCKS - 1


def test_metrics_count_over_both_servers(pair):
    """Requests over many connections reach both processes; /metrics adds them up."""

    def total(name, **labels):
        found = 0.0
        for line in pair.client.get("/metrics").text.splitlines():
            if line.startswith(f"vllm:express_{name}{{") and all(
                f'{key}="{value}"' in line for key, value in labels.items()
            ):
                found += float(line.rsplit(" ", 1)[1])
        return found

    before = {name: total(name) for name in ("requests_total", "peak_kv_tokens_count")}
    refused = total("refused_requests_total", reason="memory_tokens")
    for _ in range(12):
        for express, status in (('{"memory_tokens": 256}', 200), ('{"memory_tokens": 1}', 400)):
            answer = httpx.post(
                f"{pair.url}/v1/completions", content=body("completions", express), timeout=300,
                headers={"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
            )  # fmt: skip
            assert answer.status_code == status
            if status == 200:
                assert answer.json()["usage"]["express"]["memory_tokens"] == 256
    wait_for_rest(pair)
    assert total("requests_total") - before["requests_total"] == 12
    assert total("peak_kv_tokens_count") - before["peak_kv_tokens_count"] == 12
    assert total("refused_requests_total", reason="memory_tokens") - refused == 12
    assert total("held_kv_tokens") == total("requests_running") == 0
    log = pair.log.read_text()
    assert log.count("express: request API at /v1/express") == 2, "in both processes"
