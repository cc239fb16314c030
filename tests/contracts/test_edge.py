"""One decision per budget: what the edge admits is what the engine reads, whatever comes in."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import random_llama
import torch
from budgets import WIDE
from engines import SUPPORT, engine_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.request import Request
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from express_vllm import edge, patches
from express_vllm.budget import PREFIX
from express_vllm.settings import Settings


def processor(model_path, length=2048, **express):
    config = engine_config(
        model_path, attention_backend="express", enable_prompt_embeds=True,
        additional_config={"express": express},
    )  # fmt: skip
    config.model_config.max_model_len = length  # as the engine writes what it fitted
    return InputProcessor(config)


@pytest.fixture(scope="module")
def processors(model_path):
    """Two engines of one process, with other limits."""
    return [
        processor(model_path, 2000, memory_tokens=512, max_memory_tokens=1024),
        processor(model_path, 1500, memory_tokens=256, min_memory_tokens=200, mode="exact"),
    ]


def token_prompt(tokens):
    return {"type": "token", "prompt_token_ids": [1] * tokens}


def embedded_prompt(tokens):
    return {"type": "embeds", "prompt_embeds": torch.zeros(tokens, 4)}


def sent(request):
    """The request as the engine's process gets it."""
    decoder = MsgpackDecoder(EngineCoreRequest)
    again = decoder.decode(MsgpackEncoder().encode(request))
    return Request.from_engine_core_request(again, None)


fields = st.fixed_dictionaries(
    {},
    optional={
        "memory_tokens": st.one_of(st.integers(1, 2200), st.sampled_from([128, "512", 2.5, None])),
        "memory": st.sampled_from(["10%", "50%", "900%", "1MiB", "8MiB", "x"]),
        "compute_tokens": st.integers(100, 2100),
        "seed": st.integers(-1, 2**63),
        "mode": st.sampled_from(["express", "exact", "fast"]),
        "profile": st.sampled_from(["recent", "even"]),
        "pinned_tokens": st.one_of(st.integers(-1, 2200), st.sampled_from(["system", True])),
        "granted": st.just([1]),
    },
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(0, 1), st.sampled_from([token_prompt, embedded_prompt]), st.integers(1, 2100),
    st.one_of(st.none(), st.integers(1, 2100)), fields, st.integers(1, 3),
)  # fmt: skip
def test_what_is_admitted_the_engine_reads(processors, which, prompt, tokens, output, asked, n):
    """Any length, tokens or embeddings, any budget: refused here, or the engine's own is the same.
    The caller's parameters stay as they are."""
    here = processors[which]
    extra = {PREFIX + name: value for name, value in asked.items()} | {"other": 1}
    params = SamplingParams(max_tokens=output, extra_args=extra, n=n)
    heard = Heard()
    with heard:
        try:
            request = here.process_inputs("name", prompt(tokens), params, ("generate",))
        except VLLMValidationError:
            assert not heard.found
            return
        finally:
            assert params.extra_args == extra
    ((name, budget, length, sequences),) = heard.found
    assert (name, length, sequences) == ("name", tokens, n)
    arrived = sent(request)
    assert set(arrived.sampling_params.extra_args) == {"other", edge.GRANTED}
    settled = Settings.of(here.vllm_config)
    assert edge.granted(arrived, settled) == budget
    most = min(tokens + arrived.max_tokens, settled.max_model_len)
    assert budget.reserved(most) <= settled.most_slots


class Heard:
    """A listener that writes down what was admitted."""

    prefix = PREFIX

    def __init__(self):
        self.found = []

    def admitted(self, *what):
        self.found.append(what)

    def __enter__(self):
        self._token = edge.current.set(self)

    def __exit__(self, *_):
        edge.current.reset(self._token)


def refusal(processor, prompt, output=16, *, resumable=False, **asked):
    extra = {PREFIX + name: value for name, value in asked.items()}
    params = SamplingParams(max_tokens=output, extra_args=extra)
    with pytest.raises(VLLMValidationError) as error:
        processor.process_inputs("name", prompt, params, ("generate",), resumable=resumable)
    return str(error.value)


def test_embeddings_have_a_length(processors):
    text = refusal(processors[0], embedded_prompt(200), mode="exact", memory_tokens=167)
    assert "216 tokens" in text and "of 167 keeps 128" in text


def test_each_engine_of_a_process_has_its_own_limits(processors):
    assert "1024" in refusal(processors[0], token_prompt(1100), memory_tokens=1100)
    assert f"200 to {WIDE.tokens(1500)}" in refusal(
        processors[1], token_prompt(1100), memory_tokens=150
    )


def test_a_length_that_was_fitted_later_counts(model_path):
    late = processor(model_path, 2048)
    late.process_inputs(
        "a", token_prompt(100), SamplingParams(extra_args={"express_memory_tokens": 2600}),
        ("generate",),
    )  # fmt: skip
    late.vllm_config.model_config.max_model_len = 1728
    assert f"167 to {WIDE.tokens(1728)}" in refusal(late, token_prompt(100), memory_tokens=2600)


def test_a_stream_of_inputs_is_refused(processors):
    assert "stream of inputs" in refusal(processors[0], token_prompt(9), resumable=True)


def test_other_backends_are_left_alone(model_path):
    plain = InputProcessor(engine_config(model_path))
    extra = {"express_memory_tokens": "anything"}
    request = plain.process_inputs(
        "a", token_prompt(9), SamplingParams(extra_args=extra), ("generate",)
    )  # fmt: skip
    assert request.sampling_params.extra_args == extra


# --- an engine that gets what no edge would send --------------------------------------------------

STRANGE = {
    "no budget": {},
    "an old client's": {"express_memory_tokens": 300},
    "not a list": {edge.GRANTED: "express"},
    "another server's": {edge.GRANTED: ["express", 99999, 99999, 0, "recent", 99999, True, 0, 4]},
    "too small": {edge.GRANTED: ["exact", 512, 512, 0, "recent", 8, False, 0, 0]},
    "wrong types": {edge.GRANTED: ["express", None, [], {}, 7, "512", True, 0, 4]},
    "off the grid": {edge.GRANTED: ["express", 512, 512, 0, "recent", 512, True, 0, 100]},
}


@pytest.mark.server
def test_a_strange_request_ends_alone(tmp_path):
    """Requests without a budget, with a foreign one, or whose id is in use, among honest ones."""
    output = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, __file__, str(output)], text=True, capture_output=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(SUPPORT)},
    )  # fmt: skip
    assert output.exists(), done.stderr[-4000:]
    found = json.loads(output.read_text())
    assert found["strange"] == {name: ["error", 0] for name in STRANGE}
    assert found["honest"] == found["alone"] and len(found["alone"]) == 12
    assert found["twice"] == "alive"
    assert found["left"] == {"budgets": 0, "tracked": 0, "requests": 0}
    assert found["blocks"][0] == found["blocks"][1]


def _run(output):
    """In a process of its own: strange and honest requests on one engine."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM

    model = random_llama.write(Path(output).parent / "model", random_llama.QUICK)
    llm = LLM(
        str(model), attention_backend="express", enforce_eager=True, max_model_len=2048,
        dtype="float32", num_gpu_blocks_override=80,
        kv_cache_memory_bytes=1 << 28, additional_config={"express": {"memory_tokens": 128}},
    )  # fmt: skip
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    blocks = [pool.get_num_free_blocks()]
    prompt = {"prompt_token_ids": list(range(1, 300))}

    def add(name, extra=None):
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, extra_args=extra)
        engine.add_request(name, prompt, params)

    def finish(during=lambda: None):
        found = {}
        while engine.has_unfinished_requests():
            for one in engine.step():
                if one.finished:
                    found[one.request_id] = one.outputs[0]
            during()
        return found

    add("alone")
    alone = finish()["alone"].token_ids
    admit = edge.admit

    def strange_admit(request, settled):
        if request.request_id in STRANGE:
            request.sampling_params.extra_args = STRANGE[request.request_id]
        else:
            admit(request, settled)

    patches.admit = strange_admit
    add("honest")
    for name in STRANGE:
        add(name)

    def twice():
        with contextlib.suppress(StopIteration):
            scheduler.add_request(next(iter(scheduler.requests.values())))

    found = finish(twice)
    honest = found.pop("honest")
    blocks.append(pool.get_num_free_blocks())
    add("last")
    result = {
        "alone": list(alone), "honest": list(honest.token_ids), "blocks": blocks,
        "strange": {name: [one.finish_reason, len(one.token_ids)] for name, one in found.items()},
        "twice": "alive" if list(finish()["last"].token_ids) == list(alone) else "changed",
        "left": {
            "budgets": len(scheduler.express_budgets), "tracked": len(scheduler.express_tracked),
            "requests": len(scheduler.requests),
        },
    }  # fmt: skip
    Path(output).write_text(json.dumps(result))


if __name__ == "__main__":
    _run(sys.argv[1])
