"""Wide layers hold more slots: what the server takes, and the real engine with them."""

import copy
from types import SimpleNamespace

import pytest
import torch
from budgets import WIDE, resolve
from cpu_layer import KV_HEADS, Runner, drive, make_batch
from engines import engine_config, request, run_engine, same_tokens

from bench.quality import harness
from bench.quality.policies import DEFAULT, Policy
from express_vllm import smallmodel
from express_vllm.backend.attention import ExpressBackend
from express_vllm.backend.pages import slot_pages
from express_vllm.config import ServerConfig
from express_vllm.fields import BudgetError
from express_vllm.scheduler.spec import ExpressSpec
from express_vllm.wide import MEASURED, settle

ON_GPU = torch.cuda.is_available()


def test_the_small_model_is_known_and_others_have_equal_layers(small_config):
    found = settle(ServerConfig(), small_config)
    assert (found.wide_layers, found.wide_factor) == ((18, 20, 23), 4)
    other = copy.copy(small_config)
    other.hidden_size = 960
    assert settle(ServerConfig(), other).wide_layers == ()
    assert settle(ServerConfig(), SimpleNamespace(num_hidden_layers=4)).wide_layers == ()
    assert settle(ServerConfig(wide_layers=()), small_config).wide_layers == ()
    own = ServerConfig.parse({"wide_layers": [3], "wide_factor": 2})
    assert settle(own, small_config) == own and own.wide_layers == (3,)


def test_measured_layers_are_there():
    for model, wide in MEASURED.items():
        assert set(wide.layers) <= set(range(model.layers))
        assert ServerConfig(wide_layers=wide.layers, wide_factor=wide.factor)


LIST, FACTORS = "it must be a list of different layer numbers", "it must be one of 2, 4, 8"


@pytest.mark.parametrize(
    "raw, rule",
    [
        ({"wide_layers": 3}, LIST),
        ({"wide_layers": [3, 3]}, LIST),
        ({"wide_layers": [-1]}, LIST),
        ({"wide_layers": ["3"]}, LIST),
        ({"wide_layers": [True]}, LIST),
        ({"wide_factor": 3}, FACTORS),
        ({"wide_factor": "4"}, FACTORS),
        ({"wide_layers": [30]}, "the model's layers are 0 to 29"),
    ],
)
def test_wrong_layers_and_factors_are_named(raw, rule, small_config):
    ((name, value),) = raw.items()
    with pytest.raises(BudgetError) as caught:
        settle(ServerConfig.parse(raw), small_config)
    assert str(caught.value).startswith(f"express.{name}={value!r} is not allowed: {rule}")


def test_a_budget_has_both_shapes_and_its_blocks_suffice_for_both(small_config):
    config = settle(ServerConfig(), small_config)
    for fields in ({}, {"express_compute_tokens": 600}, {"express_profile": "even"}):
        budget = resolve(
            {"express_memory_tokens": 700, **fields}, config, prompt_tokens=6000, max_tokens=0,
            size=WIDE,
        )  # fmt: skip
        # 27 and 3 layers, whose mean is what was granted.
        held, attended = budget.memory_tokens, budget.compute_tokens
        assert 27 * budget.slots + 3 * budget.wide.slots <= 30 * held <= 30 * 700
        live = [layout.attended_peak for layout in (budget.layout, budget.layout_in(True))]
        assert 30 * (attended - 20) < 27 * live[0] + 3 * live[1] <= 30 * attended
        assert budget.wide.slots <= 4 * budget.shape.slots
        wide, plain = budget.layout_in(True), budget.layout_in(False)
        assert plain is budget.layout is not wide
        for tokens in range(0, 6000, 7):
            assert wide.reserved(tokens) <= 4 * budget.reserved(tokens)
            assert wide.live(tokens) <= wide.reserved(tokens)


def test_a_wide_page_is_the_ordinary_one_with_more_slots():
    spec = ExpressSpec(block_size=16, num_kv_heads=3, head_size=64, dtype=torch.bfloat16)
    wide = spec.widened(4)
    assert wide.page_size_bytes == 4 * spec.page_size_bytes
    assert wide.block_size == spec.block_size and wide != spec
    cache = torch.arange(5 * 12 * 16 * 128).view(5, 12, 16, 128)
    pages = slot_pages(cache, 3)
    assert pages.shape == (5, 3, 64, 128) and pages.data_ptr() == cache.data_ptr()
    assert slot_pages(pages, 3) is pages


def test_vllm_puts_both_kinds_of_layers_into_one_group(model_path):
    """So that one block table serves them: a contract with vLLM."""
    from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

    config = engine_config(model_path, attention_backend="express", dtype="bfloat16")
    spec = ExpressSpec(block_size=128, num_kv_heads=3, head_size=64, dtype=torch.bfloat16)
    specs = {f"layers.{i}": spec.widened(4) if i in (18, 20, 23) else spec for i in range(30)}
    layouts = [layout.name for layout in ExpressBackend.supported_kv_cache_layouts()]
    resolve_kv_cache_layout(config, [layouts], specs.values())
    (found,) = get_kv_cache_configs(config, [specs], [1 << 30])
    assert len(found.kv_cache_groups) == 1 and len(found.kv_cache_groups[0].layer_names) == 30
    assert found.num_blocks == (1 << 30) // (39 * spec.page_size_bytes)


@pytest.mark.parametrize("steps", [[700], [300, 200, 150, 50], [500] + [1] * 200])
def test_a_wide_layer_is_an_ordinary_one_of_a_larger_budget(steps):
    """In float32 bit for bit, on pages that vLLM made for more KV heads."""
    batch = make_batch(700, 64, 5)
    plain = Runner(64, torch.float32, 64)
    expected = drive(plain, plain.start(batch, memory_tokens=512), steps)
    runner = Runner(64, torch.float32, 64)
    runner.cache = slot_pages(runner.cache.reshape(-1, 4 * KV_HEADS, 16, 128), KV_HEADS)
    runner.wide, config = True, ServerConfig(seed=9, wide_layers=(0,))
    wide = runner.start(batch, config=config, memory_tokens=128)
    assert torch.equal(drive(runner, wide, steps), expected)
    assert len(wide.blocks) == 8 and wide.budget.shape.slots == 128


def served(tmp_path, requests, **options):
    """The requests under a server with these wide layers."""
    options = {"express": {"memory_tokens": 512, "max_memory_tokens": 1024, **options}}
    (found,) = run_engine(
        tmp_path, "express", [("generate", {"requests": requests})], additional_config=options
    )
    return found


@pytest.mark.slow
@pytest.mark.server
def test_all_layers_wide_is_a_larger_budget(tmp_path, tokens):
    prompts = [tokens[:900], tokens[900:1500]]
    # As many tokens' memory: 128 slots of an ordinary layer would be the rest of it.
    sent = [request(p, 40, memory_tokens=512) for p in prompts]
    all_wide = served(tmp_path, sent, wide_layers=list(range(30)))
    plain = served(tmp_path, sent, wide_layers=[])
    assert same_tokens(all_wide, plain) == len(prompts)
    assert 4 * all_wide["peak_blocks"] == plain["peak_blocks"]


@pytest.mark.slow
@pytest.mark.server
def test_the_engine_serves_what_the_harness_measures(tmp_path, tokens):
    """Fed the engine's own text, the harness finds its tokens likeliest where they were clearly so;
    with equal layers it does not."""
    prompt = tokens[7000:8500]
    # The model's own wide layers.
    found = served(tmp_path, [request(prompt, 64, memory_tokens=208)])
    path = smallmodel.ensure()
    model, _ = harness.load(path, "cuda" if ON_GPU else "cpu", torch.float32)
    heads = harness.heads_of(model)
    ids = torch.tensor([prompt + found["tokens"][0]]).to(model.device)

    def widest_error(text, slots):
        """How sure the engine was of a token that is not the harness's likeliest."""
        policy = Policy.parse(text, slots)
        assert min(policy.layer_slots(heads)) == 160
        stream = harness.Stream(model, policy.caches(heads))
        hidden = stream.feed(ids[:, :-1])[:, len(prompt) - 1 :]
        _, first = harness.log_probabilities(model, hidden, ids[:, len(prompt) :])
        margins = zip(found["margins"][0], first[0].tolist(), strict=True)
        return max((margin for margin, same in margins if not same), default=0.0)

    assert widest_error(DEFAULT, 208) < 0.1
    assert widest_error("express", 160) > 0.5
