"""A server of the small model answers a question (marker `slow`)."""

import pytest

pytestmark = [pytest.mark.server, pytest.mark.slow]


def test_chat_answers(small_server):
    body = {
        "model": "small",
        "messages": [{"role": "user", "content": "What is 2+2?"}],
        "max_tokens": 30,
        "temperature": 0,
    }
    answer = small_server.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    assert "4" in answer.json()["choices"][0]["message"]["content"]
