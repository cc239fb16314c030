"""Budgets: what is accepted, what is refused, and what the refusal says."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from express_vllm.budget import BudgetError, ServerConfig, resolve
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
        assert fits.shape is None
        assert fits.reserved(70) == 70
    assert ask(memory_tokens=4096, prompt=4000, max_tokens=97).shape is not None


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
    if budget.layout is not None:
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
