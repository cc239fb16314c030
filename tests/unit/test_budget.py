"""Budgets: what is accepted, what is refused, and what the refusal says."""

import json
import math

import msgspec
import pytest
from budgets import EQUAL, WIDE, resolve
from budgets import settings as server
from hypothesis import given, settings
from hypothesis import strategies as st

from express_vllm.budget import on_grid, pins, unpack
from express_vllm.config import ServerConfig
from express_vllm.fields import BudgetError
from express_vllm.shape import RING_SLOTS

CONFIG = ServerConfig(memory_tokens=1024, max_memory_tokens=4096)


def ask(config=CONFIG, prompt=6000, max_tokens=100, size=EQUAL, **fields):
    arguments = {f"express_{name}": value for name, value in fields.items()}
    return resolve(arguments, config, prompt_tokens=prompt, max_tokens=max_tokens, size=size)


def test_defaults_come_from_the_server():
    budget = ask()
    assert (budget.mode, budget.memory_tokens, budget.profile) == ("express", 1024, "recent")
    assert budget.shape.slots == 1024 and budget.reserved(6000) == 1024


def test_compute_caps_what_a_token_attends_to():
    budget = ask(memory_tokens=2048, compute_tokens=512)
    assert budget.layout.attended_peak == 512
    assert budget.shape.slots == 512 + RING_SLOTS <= budget.memory_tokens


def test_a_sequence_that_fits_stays_exact():
    for fits in (ask(memory_tokens=4096, prompt=4000, max_tokens=96), ask(mode="exact", prompt=50)):
        assert fits.exact and fits.layout_in(wide=True).shape.exact
        assert fits.reserved(70) == 70
    assert not ask(memory_tokens=4096, prompt=4000, max_tokens=97).exact


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"memory_tokens": 127}, ["express_memory_tokens", "127", "128", "4096"]),
        ({"memory_tokens": 4097}, ["express_memory_tokens", "4097", "4096"]),
        ({"memory_tokens": -1}, ["express_memory_tokens", "-1", "128"]),
        ({"memory_tokens": 2**63}, ["express_memory_tokens", str(2**63), "4096"]),
        ({"memory_tokens": "512"}, ["express_memory_tokens", "'512'", "integer"]),
        ({"memory_tokens": 512.0}, ["express_memory_tokens", "512.0", "integer"]),
        ({"memory_tokens": True}, ["express_memory_tokens", "True", "integer"]),
        ({"memory_tokens": [512]}, ["express_memory_tokens", "[512]", "integer"]),
        ({"memory_tokens": math.nan}, ["express_memory_tokens", "nan", "integer"]),
        ({"compute_tokens": 2000}, ["express_compute_tokens", "2000", "1024"]),
        ({"seed": -1}, ["express_seed", "-1", "0"]),
        ({"mode": "fast"}, ["express_mode", "'fast'", "express, exact"]),
        ({"profile": 3}, ["express_profile", "3", "recent, even"]),
        ({"memory": 512}, ["express_memory", "did you mean express_memory_tokens"]),
        ({"mode": "exact"}, ["express_mode", "6100", "4096", "max_tokens"]),
        ({"pinned_tokens": -1}, ["express_pinned_tokens", "-1", "integer from 0 to 16777216"]),
        ({"pinned_tokens": 16.0}, ["express_pinned_tokens", "16.0", "integer", "'system'"]),
        ({"pinned_tokens": True}, ["express_pinned_tokens", "True", "integer"]),
        ({"pinned_tokens": "16"}, ["express_pinned_tokens", "'16'", "integer", "'system'"]),
        ({"pinned_tokens": "system"}, ["express_pinned_tokens", "integer here", "/v1/messages"]),
        ({"pinned_tokens": 1000}, ["express_pinned_tokens", "1000", "memory_tokens", "1216"]),
        ({"pinned_tokens": 5000}, ["express_pinned_tokens", "5000", "take 5888", "most is 4096"]),
    ],
)
def test_bad_fields_name_field_value_and_range(fields, words):
    with pytest.raises(BudgetError) as error:
        ask(**fields)
    for word in words:
        assert word in str(error.value)


@settings(deadline=None)
@given(st.integers(128, 1 << 24))
def test_the_grid_gives_nearly_what_is_asked_for(slots):
    granted = on_grid(slots)
    assert slots * (1 - 15 / 143) <= granted <= slots
    assert on_grid(granted) == granted, "what a request was granted it can ask for"


def test_a_server_has_a_few_hundred_shapes_whatever_is_asked_for():
    """All memory budgets of a server of 128K tokens, and compute budgets below them."""
    config = ServerConfig()
    shapes = set()
    for memory in range(128, 131_072, 7):
        extra = {"express_memory_tokens": memory}
        if memory % 2:
            extra["express_compute_tokens"] = 128 + memory * 37 % (memory - 127)
        budget = resolve(
            extra, config, prompt_tokens=131_000, max_tokens=72, max_model_len=131_072
        )  # fmt: skip
        assert budget.slots <= budget.memory_tokens <= memory
        shapes.add(budget.shape)
    assert 100 < len(shapes) < 400


def test_a_pin_is_rounded_up_to_a_grid_and_no_less_than_the_servers_sinks():
    for asked, granted in ((None, 4), (0, 4), (4, 4), (5, 16), (16, 16), (17, 32), (500, 512)):
        assert ask(pinned_tokens=asked).shape.sinks == granted
        assert ask(pinned_tokens=asked).pinned(6000) == granted
    assert ask(ServerConfig(sinks=64), pinned_tokens=20).shape.sinks == 64
    assert ask(pinned_tokens=4) == ask(), "what the server pins anyway changes nothing"


@settings(deadline=None)
@given(st.integers(5, 1 << 24))
def test_a_pin_is_nearly_what_is_asked_for(tokens):
    granted = pins(tokens, CONFIG)
    assert tokens <= granted < tokens + max(16, tokens / 8)
    assert pins(granted, CONFIG) == granted and on_grid(granted) == granted


def test_a_server_has_a_few_hundred_pins():
    assert 100 < len({pins(tokens, CONFIG) for tokens in range(131_072)}) < 200


def test_a_pin_is_counted_in_the_budget_and_leaves_a_balanced_rest():
    budget = ask(memory_tokens=1024, pinned_tokens=500)
    shape, rest = budget.shape, 1024 - 512 + 4
    assert budget.reserved(6000) == shape.slots == 1024 and shape.sinks == 512
    assert (shape.window, shape.heavy, shape.interval) == (rest // 4, rest // 8, 64)


def test_ordinary_and_wide_layers_pin_the_same_tokens():
    config = ServerConfig(wide_layers=(18, 20, 23))
    budget = ask(config, size=WIDE, memory_tokens=1024, pinned_tokens=300)
    assert budget.wide.slots == 4 * budget.shape.slots
    assert budget.wide.sinks == budget.shape.sinks == 304


def test_of_a_short_prompt_all_is_pinned_and_no_more():
    """The same number of tokens may be sent with prompts of any length."""
    assert ask(prompt=100, max_tokens=4000, pinned_tokens=4000).shape.sinks == 112


def test_a_request_that_keeps_every_token_pins_them():
    for fields in ({"memory_tokens": 4096}, {"mode": "exact"}):
        budget = ask(prompt=1000, pinned_tokens=3000, **fields)
        assert budget.exact and budget.pinned(1050) == 1050


@settings(deadline=None)
@given(st.integers(300, 3000), st.sampled_from(["lazy", "paper"]), st.booleans())
def test_the_memory_that_a_refused_pin_asks_for_is_the_least(pinned, schedule, wide):
    config = ServerConfig(schedule=schedule, wide_layers=(18, 20, 23) if wide else ())
    size = WIDE if wide else EQUAL
    with pytest.raises(BudgetError) as error:
        ask(config, size=size, memory_tokens=208, pinned_tokens=pinned)
    assert error.value.value == pinned and error.value.field == "express_pinned_tokens"
    least = int(str(error.value).rpartition(" ")[2])
    budget = ask(config, size=size, memory_tokens=least, pinned_tokens=pinned)
    assert budget.memory_tokens == least and budget.shape.sinks >= pinned
    with pytest.raises(BudgetError, match=f"at least {least}"):
        ask(config, size=size, memory_tokens=least - 1, pinned_tokens=pinned)


def test_a_short_request_needs_no_more_for_a_pin_than_what_keeps_all_of_it():
    with pytest.raises(BudgetError, match=r"at least 620$"):
        ask(prompt=600, max_tokens=20, memory_tokens=512, pinned_tokens=600)
    assert ask(prompt=600, max_tokens=20, memory_tokens=620, pinned_tokens=600).exact


def test_the_operators_minimum_is_granted_even_off_the_grid():
    config = ServerConfig(memory_tokens=2048, min_memory_tokens=205)
    assert ask(config, memory_tokens=206).memory_tokens == 205


@settings(deadline=None)
@given(
    st.integers(167, 4096), st.integers(1, 8000), st.integers(1, 300), st.integers(0, 2**63 - 1),
    st.sampled_from(["recent", "even"]), st.floats(0, 0.6),
)  # fmt: skip
def test_a_budget_survives_its_way_to_the_engine(memory, prompt, output, seed, profile, pinned):
    config = ServerConfig(max_memory_tokens=4096, wide_layers=(1,))
    budget = ask(
        config, prompt, output, WIDE, memory_tokens=memory, seed=seed, profile=profile,
        pinned_tokens=max(0, int((memory - 224) * pinned)),
    )  # fmt: skip
    here, length = server(config, size=WIDE), prompt + output
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(budget.packed))
    assert unpack(sent, here, length) == budget
    assert unpack(json.loads(json.dumps(budget.packed)), here, length) == budget


@pytest.mark.parametrize(
    ("packed", "length"),
    [
        (None, 100),
        ({"mode": "express"}, 100),
        ([], 100),
        (["express", 512, 512, 0, "recent", 512], 6000),
        (["express", 512, 512, 0, "nowhere", 512, True, 0, 4], 6000),
        (["express", 512, 512, 0, "recent", 100, True, 0, 4], 6000),
        (["express", 512, 512, 0, "recent", 512, True, 512, 4], 6000),
        (["express", 8000, 8000, 0, "recent", 8000, True, 0, 4], 6000),
        (["exact", 4096, 4096, 0, "recent", 99, False, 0, 0], 100),
        (["exact", 8192, 8192, 0, "recent", 5000, False, 0, 0], 5000),
        (["exact", 4096, 4096, 0, "recent", 4000, False, 0, 4], 4000),
        (["express", 512, 512, 0, "recent", 512.0, True, 0, 4], 6000),
        (["express", 512, 512, 0, "recent", 512, 1, 0, 4], 6000),
        *(
            (["express", 512, 512, 0, "recent", 512, True, 0, pinned], 6000)
            for pinned in (0, 5, 100, -16, 16.0, True, None, "16", 2**70, 400)
        ),
    ],
)
def test_what_is_no_budget_of_this_server_is_told(packed, length):
    """A request that outgrows what its budget says would write into the blocks of others."""
    with pytest.raises(ValueError, match=r"no budget|not one of|at least 128|leave 116"):
        unpack(packed, server(CONFIG), length)


def test_a_budget_of_another_division_among_layers_is_told():
    wide = server(ServerConfig(wide_layers=(1,)), size=WIDE)
    for slots in (0, 4 * 512 + 1):
        with pytest.raises(ValueError, match="no budget of this server"):
            unpack(["express", 666, 666, 0, "recent", 512, True, slots, 4], wide, 6000)


@settings(deadline=None)
@given(st.data(), st.integers(1, 8000), st.sampled_from(["lazy", "paper"]), st.booleans())
def test_memory_and_compute_are_means_over_the_layers(data, prompt, schedule, heavy):
    """27 layers and 3 wide ones, whatever is asked for: never more than the budget, and all of it
    but the grid's and the division's remainders."""
    config = ServerConfig(
        wide_layers=(18, 20, 23), schedule=schedule, heavy=None if heavy else 0
    )  # fmt: skip
    here = server(config, size=WIDE)
    memory = data.draw(st.integers(here.min_memory_tokens, here.max_memory_tokens))
    compute = data.draw(st.integers(here.least_tokens, memory))
    budget = ask(
        config, prompt, 192, WIDE, memory_tokens=memory, compute_tokens=compute
    )  # fmt: skip
    tokens = prompt + 192
    layers = [(27, budget.layout), (3, budget.layout_in(True))]
    if budget.exact:
        assert WIDE.tokens(tokens) <= compute, "a request that keeps every token fits its budget"
        return
    assert tokens > WIDE.slots(compute)
    held = sum(n * layout.shape.slots for n, layout in layers) / 30
    attended = sum(n * layout.attended_peak for n, layout in layers) / 30
    assert held <= budget.memory_tokens <= memory
    assert attended <= budget.compute_tokens <= compute
    if compute == memory:
        assert held > budget.memory_tokens - 2 and budget.memory_tokens > memory * 0.89


def test_an_exact_request_says_how_many_tokens_its_memory_keeps():
    with pytest.raises(BudgetError, match=r"6100 tokens, but .* of 6500 keeps 5000"):
        ask(ServerConfig(wide_layers=(1,)), size=WIDE, mode="exact", memory_tokens=6500)
    budget = ask(ServerConfig(wide_layers=(1,)), size=WIDE, mode="exact", memory_tokens=7930)
    assert budget.reserved(6100) == 6100


def test_other_extra_args_are_left_alone():
    arguments = {"session_id": "a", "kv_transfer_params": {}}
    budget = resolve(arguments, CONFIG, prompt_tokens=10, max_tokens=None)
    assert budget.memory_tokens == 1024


@settings(max_examples=200, deadline=None)
@given(
    st.integers(128, 4096),
    st.data(),
    st.integers(1, 8000),
    st.sampled_from(["recent", "even"]),
    st.sampled_from(["lazy", "paper"]),
)
def test_no_legal_budget_is_exceeded(memory, data, prompt, profile, schedule):
    compute = data.draw(st.integers(128, memory))
    config = ServerConfig(memory_tokens=128, max_memory_tokens=4096, schedule=schedule)
    budget = ask(
        config,
        memory_tokens=memory,
        compute_tokens=compute,
        prompt=prompt,
        profile=profile,
        max_tokens=192,
    )
    total = min(prompt + 192, 8192)
    assert budget.reserved(total) <= memory
    if not budget.exact:
        assert budget.layout.attended_peak <= compute


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"memory_token": 5}, ["express.memory_token", "did you mean memory_tokens"]),
        ({"memory_tokens": 5}, ["express.memory_tokens", "5", "128"]),
        ({"memory_tokens": 4096, "max_memory_tokens": 2048}, ["max_memory_tokens", "4096"]),
        ({"schedule": "eager"}, ["express.schedule", "lazy, paper"]),
        ({"exponent": 1.5}, ["express.exponent", "1.5", "from 0 to 1"]),
        ({"window": 2000}, ["express.memory_tokens", "2000"]),
        (["x"], ["express", "object"]),
    ],
)
def test_bad_server_config_is_refused(raw, words):
    with pytest.raises(BudgetError) as error:
        ServerConfig.parse(raw)
    for word in words:
        assert word in str(error.value)
