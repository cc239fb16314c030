"""Errors are small, on one line, and cost nothing, whatever the request says."""

from __future__ import annotations

import asyncio
import importlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from express_vllm.fields import SHOWN_NAME, BudgetError, Fields, parse
from express_vllm.patches import LONGEST_MESSAGE, cut_messages_before_cleaning
from express_vllm.server.bounded import LONGEST, BoundedErrors, shorten
from express_vllm.server.errors import refused


@pytest.mark.parametrize(
    "name",
    [
        "x" * 10**6, "/a" * 8000, "a\nINFO 01-01 a line that was never logged", "a\rb", "\x1b[2J",
        "\u2028", "\ud800", "\0", "é" * 10**5, "🎉" * 70, "", "'\"\\",
    ],
)  # fmt: skip
def test_a_refused_name_is_cut_and_escaped_wherever_it_is_printed(name):
    with pytest.raises(BudgetError) as caught:
        parse({name: 1}, Fields, "express.")
    error = refused(caught.value)
    for text in (str(caught.value), str(error), error.parameter):
        assert text.isprintable() and text.isascii()
        assert len(text) < 600
    assert error.parameter.startswith("express.")
    assert len(error.parameter) < SHOWN_NAME + len("... (1000008 characters)") + 1


def test_names_that_fit_are_shown_as_they_are():
    with pytest.raises(BudgetError, match=re.escape("express.memory_token=1 is not")) as caught:
        parse({"memory_token": 1}, Fields, "express.")
    assert caught.value.field == "express.memory_token"
    assert "did you mean express.memory_tokens?" in str(caught.value)


def test_a_million_unknown_names_are_not_all_looked_at():
    class Many(dict):
        def __iter__(self):
            for number, name in enumerate(super().__iter__()):
                assert number < 2, "the second unknown name is of no interest"
                yield name

    with pytest.raises(BudgetError, match=r"express\.k0=1"):
        parse(Many({f"k{i}": 1 for i in range(1000)}), Fields, "express.")


def test_values_that_cannot_be_written_are_described():
    deep = []
    for _ in range(10**5):
        deep = [deep]
    assert "nested too deep" in str(BudgetError("express.seed", deep, "x"))


# --- vLLM's own messages ------------------------------------------------------------------------


def modules_that_clean():
    """Modules of vLLM that use `sanitize_message`, but those that need packages we do not have."""
    import vllm

    root = Path(vllm.__file__).parent
    found = [
        ".".join(file.relative_to(root.parent).with_suffix("").parts)
        for file in root.glob("entrypoints/**/*.py")
        if "sanitize_message" in file.read_text()
    ]
    return [name for name in found if ".cohere." not in name]


def test_every_message_that_vllm_cleans_is_cut_before():
    """Its pattern for paths takes time that grows with the cube of a text like "/a/a/a"."""
    names = modules_that_clean()
    assert len(names) >= 4, "vLLM cleans its messages elsewhere now"
    modules = [importlib.import_module(name) for name in names]
    cut_messages_before_cleaning()
    cut_messages_before_cleaning()  # a second time changes nothing
    for module in modules:
        clean = module.sanitize_message
        assert clean.__wrapped__.__module__.endswith("exception_handling.utils")
        assert not hasattr(clean.__wrapped__, "__wrapped__")
        assert len(clean("/a" * 8000)) < LONGEST_MESSAGE + 40
        assert clean("in /usr/lib/python3/x.py at 0x7f>") == "in <path>>"


@pytest.mark.slow
def test_vllms_cleaning_is_still_slow():
    """When this fails, `patches.cut_messages_before_cleaning` has done its work."""
    from time import perf_counter

    from vllm.entrypoints.serve.exception_handling import utils

    clean = getattr(utils.sanitize_message, "__wrapped__", utils.sanitize_message)

    def seconds(length):
        start = perf_counter()
        clean("/a" * (length // 2))
        return perf_counter() - start

    assert seconds(2400) > 9 * min(seconds(800) for _ in range(3)), "cubic: some 27 times"


# --- answers ------------------------------------------------------------------------------------


@given(st.recursive(
    st.none() | st.integers() | st.text(max_size=2000),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
))  # fmt: skip
def test_an_error_is_valid_json_within_its_bound(content):
    body = json.dumps({"error": {"message": "x" * 2000, "param": content}}).encode()
    short = shorten(body)
    assert len(short) <= LONGEST and json.loads(short)["error"]["message"]


def test_a_cut_error_keeps_its_form():
    error = {"message": "m" * 1500, "type": "BadRequestError", "param": "/a" * 8000, "code": 400}
    found = json.loads(shorten(json.dumps({"error": error}).encode()))["error"]
    assert found["type"] == "BadRequestError" and found["code"] == 400
    assert found["message"].startswith("mmm") and found["message"].endswith("...")
    assert found["param"].startswith("/a/a")


def test_text_is_cut_too():
    assert shorten(b"x" * 5000) == b"x" * LONGEST
    assert shorten(b"short") == b"short"


def sent(status, *pieces):
    """What a client gets of an answer in these pieces: (headers, body)."""
    messages = []

    async def send(message):
        messages.append(message)

    async def answer():
        bounded = BoundedErrors(send)
        length = str(sum(map(len, pieces))).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", length)]
        await bounded({"type": "http.response.start", "status": status, "headers": headers})
        for number, piece in enumerate(pieces, 1):
            more = number < len(pieces)
            await bounded({"type": "http.response.body", "body": piece, "more_body": more})

    asyncio.run(answer())
    assert messages[0]["status"] == status
    return dict(messages[0]["headers"]), b"".join(m["body"] for m in messages[1:])


@pytest.mark.parametrize("status", [400, 404, 422, 500, 503])
def test_error_answers_are_shortened_and_say_how_long_they_are(status):
    body = json.dumps({"error": {"message": "x" * 9000}}).encode()
    headers, found = sent(status, body[:4000], body[4000:])
    assert len(found) <= LONGEST and json.loads(found)
    assert headers[b"content-length"] == str(len(found)).encode()
    assert headers[b"content-type"] == b"application/json"


def test_other_answers_are_passed_on_as_they_come():
    headers, found = sent(200, b"x" * 4000, b"y" * 4000)
    assert found == b"x" * 4000 + b"y" * 4000 and headers[b"content-length"] == b"8000"
