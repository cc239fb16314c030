"""Which layers grow, from a model's configuration, and what the others hold."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.core.kv_cache_utils import _get_kv_cache_groups_uniform_page_size
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    SlidingWindowSpec,
)

from express_vllm.layers import Bounded, ModelLayers, UnknownLayers
from express_vllm.scheduler import register_spec
from express_vllm.scheduler.spec import ExpressSpec

F, S, C = "full_attention", "sliding_attention", "chunked_attention"


def layers(types, sliding_window=512, attention_chunk_size=128, count=None):
    config = SimpleNamespace(
        layer_types=types, sliding_window=sliding_window, attention_chunk_size=attention_chunk_size
    )
    count = count or len(types)
    return ModelLayers.of(
        SimpleNamespace(hf_text_config=config, get_total_num_hidden_layers=lambda: count)
    )


def test_layers_are_told_apart_by_their_types():
    assert layers([S, S, F, S, S, F]) == ModelLayers((2, 5), (Bounded(4, 512),))
    assert layers([C, F, C]) == ModelLayers((1,), (Bounded(2, 128),))
    assert layers([F, F, S, S], count=2) == ModelLayers((0, 1)), "prediction layers follow"
    assert layers(None, count=3) == ModelLayers((), (Bounded(3, 512),)), "as vLLM has it"
    assert layers(None, sliding_window=None, count=3) == ModelLayers.equal(3)
    assert layers([S, F], sliding_window=None) == ModelLayers.equal(2), "switched off"
    assert layers(["linear_attention"] * 3 + [F]) == ModelLayers((3,), (Bounded(3, None),))
    assert layers(["mamba", "mlp", "attention", "moe"]) == ModelLayers((2,), (Bounded(1, None),))
    with pytest.raises(UnknownLayers, match="indexed_attention"):
        layers([F, "indexed_attention"])


def spec(block_size=32, **window):
    plain = {"block_size": block_size, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
    if "sliding_window" in window:
        return SlidingWindowSpec(**plain, **window)
    if "attention_chunk_size" in window:
        return ChunkedLocalAttentionSpec(**plain, **window)
    return ExpressSpec.of(FullAttentionSpec(**plain))


@pytest.mark.parametrize(
    "types", [[S] * 5 + [F], [S, F], [F, F, S, F, F, S], [C, C, C, F] * 3, [F, F, F, S, S], [F] * 4]
)
def test_groups_are_those_that_vllm_makes(types):
    register_spec()
    specs = {F: spec(), S: spec(sliding_window=512), C: spec(attention_chunk_size=128)}
    made = {f"layers.{i}": specs[kind] for i, kind in enumerate(types)}
    groups = _get_kv_cache_groups_uniform_page_size(made)
    found = layers(types)
    ours = [g for g in groups if type(g.kv_cache_spec) is ExpressSpec]
    assert len(ours) == found.groups
    assert max(len(g.layer_names) for g in groups) == found.group_size
    others = len(groups) - len(ours)
    assert found.bounded_blocks(1 << 20, 32) == others * ((511 // 32 + 2) if S in types else 5)


def test_bounded_layers_hold_at_most_their_windows():
    found = layers([S, S, S, F])
    assert found.bounded_blocks(100, 16) == 3 * 7
    assert found.bounded_blocks(10_000, 16) == 3 * 33
    assert layers(["conv", "conv", F]).bounded_blocks(10_000, 16) == 2
