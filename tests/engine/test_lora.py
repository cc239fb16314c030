"""LoRA adapters under the real engine: they change keys and values, not who decides about them."""

import models
import pytest
from adapters import RANK, write_adapter
from engines import BLOCK, OWN, request, run_engine, same_tokens

pytestmark = [pytest.mark.slow, pytest.mark.server]


def test_adapters_and_budgets_go_together(tmp_path, tokens, small_config):
    nothing = write_adapter(tmp_path / "nothing", small_config, scale=0.0)
    random = write_adapter(tmp_path / "random", small_config, scale=0.3)
    long, short = tokens[:1500], tokens[3000:3200]
    memory = models.small().size().tokens(512)
    bounded = request(long, 32, memory_tokens=memory, seed=3)
    fits = request(short, 32, memory_tokens=memory)
    lora = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 2}

    def generate(*requests):
        return ("generate", {"requests": requests})

    # Not mixed with requests without an adapter: on a CPU vLLM 0.32 lends those another's.
    calls = [
        generate(bounded),
        generate(bounded | {"lora": nothing}),
        generate(bounded | {"lora": random}),
        generate(bounded | {"lora": random}, bounded | {"lora": nothing}),
        generate(fits | {"lora": random}),
    ]
    base, zero, alone, mixed, short_text = run_engine(tmp_path, "express", calls, **lora)
    calls = [generate(request(short, 32) | {"lora": random})]
    (own,) = run_engine(tmp_path, OWN, calls, **lora, max_model_len=1024)
    assert zero["tokens"] == base["tokens"]
    assert alone["tokens"] != base["tokens"]
    assert mixed["tokens"] == [*alone["tokens"], *zero["tokens"]]
    assert {result["peak_blocks"] for result in (base, zero, alone, mixed)} == {512 // BLOCK}
    assert not mixed["leaked"] and not mixed["budgets_left"]
    assert same_tokens(short_text, own) == 1, "the tokens of vLLM's own backend"
