"""`"pinned_tokens": "system"`: the tokens of the system messages and tools at a prompt's front.

Every chat route has vLLM's renderer make tokens of its messages.  Where the call pins `system`, the
renderer is asked again for less, with the same template, tools and tokenizer; what both begin with
is the front, and its length takes the word's place before the engine is asked.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from ..edge import current
from ..fields import BudgetError
from .body import PINNED, PREFIX
from .watch import Call

ROLES = ("system", "developer")
#: Two that differ from their first letter.
PLACEHOLDERS = ("A", "b")

#: Messages -> the tokens of their prompt, without the beginning of an answer.
Tokens = Callable[[list[Any]], Awaitable[Sequence[int]]]


def follow(renderer: Any) -> None:
    """From now on count the front of every prompt whose `Call` pins it.

    The last prompt of a call is the one that runs: vLLM may try out the template before.
    """
    render = renderer.render_chat_async

    @functools.wraps(render)
    async def followed(
        conversations: Any, chat_params: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        found = await render(conversations, chat_params, *args, **kwargs)
        call = current.get()
        if isinstance(call, Call) and call.pins_front:

            async def tokens(messages: list[Any]) -> Sequence[int]:
                _, (prompt,) = await render([messages], _unfinished(chat_params), *args, **kwargs)
                return _ids(prompt)

            (messages,), (prompt,) = conversations, found[1]
            tools = bool(chat_params.chat_template_kwargs.get("tools"))
            await _note(call, length(messages, tools, _ids(prompt), tokens))
        return found

    renderer.render_chat_async = followed


def _ids(prompt: Any) -> Sequence[int]:
    return prompt.get("prompt_token_ids") or ()


def _unfinished(chat_params: Any) -> Any:
    """The same parameters for a conversation that no answer follows."""
    changes = {"add_generation_prompt": False, "continue_final_message": False}
    return replace(
        chat_params, chat_template_kwargs={**chat_params.chat_template_kwargs, **changes}
    )


async def _note(call: Call, counted: Awaitable[int]) -> None:
    """Put the count into the call's budget, or why there is none."""
    call.no_front = None
    try:
        call.fields[PINNED] = await counted
    except BudgetError as error:
        call.no_front = error


async def length(messages: list[Any], tools: bool, prompt: Sequence[int], tokens: Tokens) -> int:
    """Tokens of the leading system messages, and of tools, in `prompt`.

    Raises BudgetError if there are none.
    """
    front = list(takewhile(lambda message: message.get("role") in ROLES, messages))
    if not front and not tools:
        raise _nothing("the conversation does not begin with a system or developer message")
    first, second = [
        await tokens([*front, {"role": "user", "content": text}]) for text in PLACEHOLDERS
    ]
    before = min(common(prompt, first), common(prompt, second))
    if not before or 2 * before < common(first, second):
        raise _nothing("the model's chat template puts system messages elsewhere in the prompt")
    if tools:  # templates list them anywhere before what the user says
        return before
    # Without the beginning of the user's turn, unless the template has the front inside that.
    alone = common(prompt, await _alone(front, tokens))
    return alone if 2 * alone > before else before


async def _alone(front: list[Any], tokens: Tokens) -> Sequence[int]:
    """Of a conversation that ends with the front; none if the template refuses it."""
    try:
        return await tokens(front)
    except Exception:  # a template raises whatever it likes
        return ()


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for at, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return at
    return min(len(first), len(second))


def _nothing(reason: str) -> BudgetError:
    return BudgetError(
        PREFIX + "pinned_tokens", "system", f"{reason}; send one, or give a number of tokens"
    )
