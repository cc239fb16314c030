"""`"pinned_tokens": "system"`: how many tokens the front of a rendered conversation has.

A token is a character; templates are those of well-known models, in Python.
"""

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from budgets import EQUAL

from express_vllm.edge import current
from express_vllm.fields import BudgetError, Fields
from express_vllm.server.body import PINNED, budget, refuse_system
from express_vllm.server.front import common, follow
from express_vllm.server.table import ROUTES, decision
from express_vllm.server.watch import Call, watch

SYSTEM = {"role": "system", "content": "You are terse."}
DEVELOPER = {"role": "developer", "content": "Mind the units."}
USER = {"role": "user", "content": "Are you there?"}
LATER = [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Good."}]
TOOLS = "get_weather(city), get_time(place)"


def turns(messages, tools, begin=True):
    """As ChatML: everything in turns, tools in the first of them."""
    text = f"<tools>{tools}</tools>" if tools else ""
    text += "".join(f"<{m['role']}>{m['content']}</>" for m in messages)
    return text + ("<assistant>" if begin else "")


def demanding(messages, tools, begin=True):
    if not any(m["role"] == "user" for m in messages):
        raise RuntimeError("a conversation needs a user")
    return turns(messages, tools, begin)


def inside(messages, tools, begin=True):
    """The system message is in the user's first turn, as are tools; alone it is nothing."""
    front = "".join(m["content"] for m in messages if m["role"] in ("system", "developer"))
    rest = [m for m in messages if m["role"] not in ("system", "developer")]
    if not rest:
        return "<s>"
    text = f"<s>[{tools or ''}{front}|"
    return text + "|".join(m["content"] + "]" for m in rest)


def at_the_end(messages, tools, begin=True):
    """Before the last thing that the user says."""
    front = "".join(m["content"] for m in messages if m["role"] == "system")
    rest = [m["content"] for m in messages if m["role"] != "system"]
    return "<s>" + "".join(f"[{text}]" for text in rest[:-1]) + f"[{front}|{rest[-1]}]"


@dataclass(frozen=True)
class ChatParams:
    """As much of vLLM's as is read."""

    chat_template_kwargs: dict


class Renderer:
    """As much of vLLM's as is followed."""

    def __init__(self, template):
        self.template = template
        self.rendered = []

    async def render_chat_async(self, conversations, chat_params, tok_params=None, **extras):
        given = chat_params.chat_template_kwargs
        text = self.template(conversations[0], given.get("tools"), given["add_generation_prompt"])
        self.rendered.append((tok_params, extras))
        return conversations, [{"prompt_token_ids": [ord(c) for c in text]}]


def pinned(template, messages, tools=None, fields=None, before=()):
    """The call after vLLM has rendered `messages`, and what it has rendered `before`."""
    renderer = Renderer(template)
    follow(renderer)
    params = ChatParams({"tools": tools, "add_generation_prompt": True})

    async def run():
        call = Call("/v1/chat/completions", EQUAL, "express.", fields or {PINNED: "system"})
        current.set(call)
        for conversation in (*before, messages):
            found = await renderer.render_chat_async([conversation], params, "tok", extra=1)
        assert found[1][0]["prompt_token_ids"] == [ord(c) for c in template(messages, tools)]
        assert set(map(str, renderer.rendered)) == {str(("tok", {"extra": 1}))}
        return call

    return asyncio.run(run())


@pytest.mark.parametrize("template", [turns, demanding, inside])
@pytest.mark.parametrize("front", [[SYSTEM], [SYSTEM, DEVELOPER]])
@pytest.mark.parametrize("later", [[], LATER])
def test_the_front_is_counted_whatever_the_template_does_with_it(template, front, later):
    call = pinned(template, [*front, USER, *later])
    text = template([*front, USER, *later], None)
    expected = {
        turns: len(turns(front, None, begin=False)),
        demanding: text.index(USER["content"]),  # the user's turn has begun
        inside: text.index(USER["content"]),
    }[template]
    assert call.fields == {PINNED: expected} and call.no_front is None


@pytest.mark.parametrize("template", [turns, inside])
@pytest.mark.parametrize("front", [[], [SYSTEM]])
def test_tools_are_part_of_the_front(template, front):
    call = pinned(template, [*front, USER], TOOLS)
    text = template([*front, USER], TOOLS)
    assert text.index(TOOLS) + len(TOOLS) < call.fields[PINNED] == text.index(USER["content"])


def test_what_the_user_says_is_never_counted():
    """However it begins."""
    for word in ("A", "b", "Ab", ""):
        messages = [SYSTEM, {"role": "user", "content": word}]
        assert pinned(inside, messages).fields[PINNED] == len("<s>[You are terse.|")


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (turns, [USER], "does not begin with a system or developer message"),
        (turns, [USER, SYSTEM], "does not begin with a system or developer message"),
        (at_the_end, [SYSTEM, USER, *LATER], "puts system messages elsewhere"),
    ],
)
def test_without_a_front_the_engine_is_not_asked(template, messages, words):
    call = pinned(template, messages)
    assert call.no_front.field == "express.pinned_tokens" and words in str(call.no_front)

    async def generate(prompt, sampling_params, request_id):
        raise AssertionError("the engine is asked")
        yield

    async def ask():
        engine = SimpleNamespace(generate=generate)
        watch(engine)
        current.set(call)
        params = SimpleNamespace(extra_args=None, output_kind=None)
        async for _ in engine.generate("x", params, "name"):
            pass

    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=words):
        asyncio.run(ask())
    assert call.error is not None and call.asked.is_set()


def test_prompts_that_vllm_tries_out_before_do_not_count():
    """`/v1/messages` looks at what the template does with another conversation first."""
    call = pinned(turns, [SYSTEM, USER], before=[[USER], [DEVELOPER, SYSTEM, USER]])
    assert call.fields[PINNED] == len(turns([SYSTEM], None, begin=False))
    assert call.no_front is None


def test_other_calls_are_rendered_once():
    call = pinned(turns, [SYSTEM, USER], fields={PINNED: 7})
    assert call.fields == {PINNED: 7}


def test_only_the_express_object_of_chat_routes_may_say_system():
    for path in (*ROUTES, "/v1/new"):
        for spelling in ("express", "vllm_xargs"):
            name = "pinned_tokens" if spelling == "express" else PINNED
            prefix, fields = budget({spelling: {name: "system"}}, Fields)
            if spelling == "express" and decision(path).system:
                refuse_system(decision(path), prefix, fields)
                continue
            with pytest.raises(BudgetError, match="it must be an integer here") as error:
                refuse_system(decision(path), prefix, fields)
            assert all(r.path in str(error.value) for r in ROUTES.values() if r.system)


def test_a_common_beginning():
    assert [common(*pair) for pair in (("", "a"), ("ab", "ab"), ("abc", "abd"), ("ab", "abc"))] == [
        0, 2, 2, 2,
    ]  # fmt: skip


def test_vllm_renders_chats_as_this_expects():
    import inspect
    from dataclasses import fields

    from vllm.renderers.base import BaseRenderer
    from vllm.renderers.online_renderer import OnlineRenderer
    from vllm.renderers.params import ChatParams as Theirs

    names = list(inspect.signature(BaseRenderer.render_chat_async).parameters)
    assert names[:3] == ["self", "conversations", "chat_params"]
    assert "chat_template_kwargs" in {field.name for field in fields(Theirs)}
    for way in (OnlineRenderer.render_chat, OnlineRenderer.render_responses):
        assert "self.preprocess_chat(" in inspect.getsource(way)
    source = inspect.getsource(OnlineRenderer.preprocess_chat)
    assert source.count("renderer.render_chat_async(") == 1 and "[messages]," in source
