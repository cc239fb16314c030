"""A server of the small model answers a question (marker `slow`)."""

import pytest
from serving import serve

pytestmark = [pytest.mark.server, pytest.mark.slow]


def test_chat_answers(model_path, tmp_path):
    body = {
        "model": "small",
        "messages": [{"role": "user", "content": "What is 2+2?"}],
        "max_tokens": 30,
        "temperature": 0,
    }
    with serve(model_path, tmp_path / "log.txt") as server:
        answer = server.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    assert "4" in answer.json()["choices"][0]["message"]["content"]
