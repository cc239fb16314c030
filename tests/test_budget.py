"""Budgets: what is accepted, what is refused, and what the refusal says."""

import json
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from express_vllm.budget import BudgetError, ServerConfig, on_grid, resolve, unpack
from express_vllm.layout import RING_SLOTS

CONFIG = ServerConfig(memory_tokens=1024, max_memory_tokens=4096)


def ask(config=CONFIG, prompt=6000, max_tokens=100, **fields):
    arguments = {f"express_{name}": value for name, value in fields.items()}
    return resolve(
        arguments, config, prompt_tokens=prompt, max_tokens=max_tokens, max_model_len=8192
    )


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
    ],
)
def test_bad_fields_name_field_value_and_range(fields, words):
    with pytest.raises(BudgetError) as error:
        ask(**fields)
    for word in words:
        assert word in str(error.value)


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


def test_the_operators_minimum_is_granted_even_off_the_grid():
    config = ServerConfig(memory_tokens=2048, min_memory_tokens=205)
    assert ask(config, memory_tokens=206).memory_tokens == 205


@given(
    st.integers(128, 4096), st.integers(1, 8000), st.integers(1, 300), st.integers(0, 2**63 - 1),
    st.sampled_from(["recent", "even"]),
)  # fmt: skip
def test_a_budget_survives_its_way_to_the_engine(memory, prompt, output, seed, profile):
    config = ServerConfig(max_memory_tokens=4096, wide_layers=(1,))
    budget = ask(
        config, prompt, output, memory_tokens=memory, seed=seed, profile=profile
    )  # fmt: skip
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(budget.packed))
    assert unpack(sent, config, prompt + output, 8192) == budget
    assert unpack(json.loads(json.dumps(budget.packed)), config, prompt + output, 8192) == budget


@pytest.mark.parametrize(
    ("packed", "length"),
    [
        (None, 100),
        ({"mode": "express"}, 100),
        ([], 100),
        (["express", 512, 512, 0, "recent", 512], 6000),
        (["express", 512, 512, 0, "nowhere", 512, True], 6000),
        (["express", 512, 512, 0, "recent", 100, True], 6000),
        (["express", 8000, 8000, 0, "recent", 8000, True], 6000),
        (["exact", 4096, 4096, 0, "recent", 99, False], 100),
        (["exact", 8192, 8192, 0, "recent", 5000, False], 5000),
    ],
)
def test_what_is_no_budget_of_this_server_is_told(packed, length):
    """A request that outgrows what its budget says would write into the blocks of others."""
    with pytest.raises(ValueError, match=r"no budget|not one of|at least 128"):
        unpack(packed, CONFIG, length, 8192)


def test_other_extra_args_are_left_alone():
    arguments = {"session_id": "a", "kv_transfer_params": {}}
    budget = resolve(arguments, CONFIG, prompt_tokens=10, max_tokens=None, max_model_len=8192)
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
