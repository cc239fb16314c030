"""Several ranks and engines give what one gives: gloo ranks on a CPU; test_gpu2.py on two GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import random_llama
import torch
from budgets import resolve
from engines import BLOCK, POOL, SUPPORT, request, run_engine
from serving import serve

from express_vllm.backend.batch import Batch
from express_vllm.backend.cpu.metadata import plan_batch
from express_vllm.backend.cpu.path import CpuPath
from express_vllm.config import ServerConfig
from express_vllm.softmax import Softmax

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(bool(GPUS), reason="gloo ranks share a CPU; see test_gpu2.py")
#: Gap of the best two tokens' log-probabilities below which GPU ranks may take the other one: they
#: add a layer's parts in another order.
TIE = 2e-3 if GPUS else 0.0
#: The tests' workers are found.
FOUND = {"PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])}
ALONE = FOUND | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
server_test = pytest.mark.server
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return random_llama.write(tmp_path_factory.mktemp("random-llama"))


def prompt(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(100, 40000, (length,), generator=generator).tolist()


def memory(slots):
    """Tokens that pay for so many slots in an ordinary layer, of EXPRESS."""
    return slots * 5 // 4


MIXED = [
    request(prompt(300, 0), 300, memory_tokens=memory(128)),
    request(prompt(60, 1), 250, mode="exact"),
    request(prompt(500, 2), 300, memory_tokens=memory(256), seed=5),
    request(prompt(700, 3), 150, memory_tokens=memory(512), profile="even"),
]
#: Nine requests of 4 to 6 blocks each do not fit the pool.
GROWING = [request(prompt(100, 10 + i), 100, memory_tokens=memory(192)) for i in range(9)]
#: A conversation: the third prompt goes on from the first one's prompt, the second from its answer.
TURNS = [
    {"parent": parent, "kept": kept, "new": prompt(length, 40 + i), "max_tokens": 20, "steps": 0,
     "seed": None, "temperature": 0.0, "extra_args": {"express_memory_tokens": memory(256)}}
    for i, (parent, kept, length) in enumerate([(None, 0, 600), (0, 20, 150), (0, 0, 100)])
]  # fmt: skip
CHAT = ("conversations", {"nodes": TURNS, "batches": [([0], 256), ([1, 2], 256)]})
ABORTED = [request(prompt(400, 20 + i), 64, memory_tokens=memory(256)) for i in range(10)]
#: 200 tokens at once, then one a step.
TALKATIVE = {**request(prompt(200, 30), 100, memory_tokens=memory(128)), "margin": False}
STEPS, TOKENS = 100, 299
#: One wide layer of four: of two pipeline stages one has it, the other has not.
EXPRESS = {"max_memory_tokens": 1024, "memory_tokens": 512, "wide_layers": [1], "wide_factor": 2}


def run_ranks(folder, backend, calls, llama, **parallel):
    """`calls` on an engine of the random model with as many ranks as `parallel` says."""
    if not GPUS and parallel:
        parallel |= {"worker_cls": "gloo_worker.GlooWorker"}
    results = run_engine(
        folder, backend, list(calls.values()), model=str(llama),
        environment=FOUND if GPUS else ALONE, max_num_batched_tokens=256, max_model_len=1024,
        additional_config={"express": EXPRESS} if backend == "express" else {}, **parallel,
    )  # fmt: skip
    return dict(zip(calls, results, strict=True))


@pytest.fixture(scope="module")
def calls():
    talk = {"before": ("collectives", {}), "talkative": ("generate", {"requests": [TALKATIVE]}),
            "talk": ("collectives", {})}  # fmt: skip
    work = {
        "mixed": ("generate", {"requests": MIXED}),
        "growing": ("generate", {"requests": GROWING}),
        # 400-token prompts in chunks of 256: step 1 is mid-prefill, the others mid-decode.
        "aborts": ("aborts", {"requests": ABORTED, "steps": [1, 2, 3, 4, 6] * 2}),
        "chat": CHAT,
    }
    return {"talk": talk, "work": work}


@pytest.fixture(scope="module")
def one(tmp_path_factory, llama, calls):
    """Without prefix caching, which several ranks have."""
    return run_ranks(tmp_path_factory.mktemp("one"), "express", calls["work"], llama)


@pytest.fixture(scope="module")
def two(tmp_path_factory, llama, calls):
    return run_ranks(
        tmp_path_factory.mktemp("two"), "express", calls["work"] | ({} if GPUS else calls["talk"]),
        llama, tensor_parallel_size=2, enable_prefix_caching=True,
    )  # fmt: skip


def assert_same(ours, expected):
    """The same tokens, up to the first tie."""
    same = 0
    for r, (found, wanted) in enumerate(zip(ours["tokens"], expected["tokens"], strict=True)):
        pairs = enumerate(zip(found, wanted, strict=True))
        first = next((i for i, (a, b) in pairs if a != b), None)
        same += len(wanted) if first is None else first
        gap = expected["margins"][r][first] if first is not None else None
        assert first is None or gap < TIE, f"request {r} leaves at {first}, where the gap is {gap}"
    print(f"{same} of {sum(map(len, expected['tokens']))} tokens are the same")


@slow
@server_test
@pytest.mark.parametrize("job", ["mixed", "growing"])
def test_two_ranks_give_the_tokens_of_one(one, two, job):
    assert all(len(set(tokens)) > 30 for tokens in one[job]["tokens"]), "not one repeated token"
    assert_same(two[job], one[job])
    assert two[job]["peaks"] == one[job]["peaks"]


def assert_hits_change_nothing(ours, expected):
    """The turns that found a state have the tokens of those that could not."""
    turns = [
        {name: [node[name] for node in result["nodes"]] for name in ("tokens", "margins", "cached")}
        for result in (ours, expected)
    ]
    assert [turn["cached"] for turn in turns] == [[0, 619, 600], [0, 0, 0]]
    assert_same(*turns)


@slow
@server_test
def test_a_state_is_copied_on_every_rank(two, one):
    assert_hits_change_nothing(two["chat"], one["chat"])


@slow
@server_test
def test_two_ranks_leak_no_block(two):
    assert two["growing"]["preemptions"] > 0, "the pool is small enough to preempt"
    for job in ("mixed", "growing"):
        assert two[job]["leaked"] == two[job]["budgets_left"] == 0
    aborts = two["aborts"]
    assert aborts["after"] == aborts["before"] == POOL - 1
    assert aborts["budgets_left"] == 0 and min(aborts["held"]) > 0
    assert max(aborts["held"]) == 256 // BLOCK


def assert_only_the_models(reductions, element):
    """The all-reduces of TALKATIVE, whose elements have so many bytes."""
    count, size = reductions
    # After attention, after the MLP, and of the embedding.
    a_step = 2 * random_llama.RANKS.layers + 1
    print(f"a step: {count // STEPS} all-reduces of {size // (TOKENS * a_step)} bytes a token")
    assert count == STEPS * a_step
    assert size == TOKENS * a_step * random_llama.HIDDEN * element


@slow
@server_test
def test_express_adds_no_communication(tmp_path, two, llama, calls):
    """The ranks say as much to each other as under vLLM's own backend: what the model needs."""
    own = run_ranks(tmp_path, "CPU_ATTN", calls["talk"], llama, tensor_parallel_size=2)
    assert two["talk"] == own["talk"]
    assert_only_the_models(two["talk"][0]["all_reduce"], element=4)
    assert set(two["talk"][0]) == {"all_reduce", "all_gather_into_tensor"}, "logits are gathered"


@slow
@server_test
def test_two_pipeline_stages_give_the_tokens_of_one(tmp_path, one, llama, calls):
    found = run_ranks(
        tmp_path, "express", calls["work"], llama, pipeline_parallel_size=2,
        enable_prefix_caching=True,
    )  # fmt: skip
    for job in ("mixed", "growing"):
        assert_same(found[job], one[job])
        assert found[job]["leaked"] == found[job]["budgets_left"] == 0
    assert found["aborts"]["after"] == found["aborts"]["before"]
    assert_hits_change_nothing(found["chat"], one["chat"])


@slow
@server_test
def test_two_engines_share_a_load(tmp_path, llama, monkeypatch):
    if not GPUS:
        for name, value in ALONE.items():
            monkeypatch.setenv(name, value)
    budgets = [{"memory_tokens": 256}, {"memory_tokens": 512}, {"mode": "exact"}]
    bodies = [
        {
            "model": "small", "prompt": prompt(400 + 100 * i, i), "max_tokens": 200,
            "temperature": 0, "ignore_eos": True,
            "vllm_xargs": {f"express_{k}": v for k, v in budgets[i % 3].items()},
        }
        for i in range(6)
    ]  # fmt: skip
    arguments = ("--data-parallel-size", "2", "--dtype", "float32")
    more = ("--enable-prompt-tokens-details",)
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")  # /reset_prefix_cache
    with serve(llama, tmp_path / "log.txt", *arguments, *more) as running:

        def answer(body, engine=None):
            to = {} if engine is None else {"X-data-parallel-rank": str(engine)}
            response = running.client.post("/v1/completions", json=body, headers=to)
            assert response.status_code == 200, response.text
            return response.json()

        def reset():
            assert running.client.post("/reset_prefix_cache").json() == {"success": True}

        with ThreadPoolExecutor(len(bodies)) as pool:
            together = list(pool.map(answer, bodies))
        alone = [[answer(body) for _ in range(2)] for body in bodies]  # each engine in turn
        metrics = running.client.get("/metrics").text
        # Each engine has states of its own, and the route empties both engines'.
        turn = bodies[0] | {"prompt": prompt(1500, 50), "max_tokens": 20}
        longer = turn | {"prompt": turn["prompt"] + prompt(100, 51)}
        reset()
        turns = [answer(body, engine) for body, engine in ((turn, 0), (longer, 0), (longer, 1))]
        reset()
        turns += [answer(longer, engine) for engine in (0, 1)]
    cached = [turn["usage"]["prompt_tokens_details"]["cached_tokens"] for turn in turns]
    assert cached == [0, 1500, 0, 0, 0]
    assert len({turn["choices"][0]["text"] for turn in turns[1:]}) == 1 or GPUS
    for i, (batched, single) in enumerate(zip(together, alone, strict=True)):
        usage = batched["usage"]["express"]
        count = 400 + 100 * i + 200
        assert usage["peak_kv_tokens"] <= budgets[i % 3].get("memory_tokens", count)
        texts = {x["choices"][0]["text"] for x in (batched, *single)}
        assert len(texts) == 1 or GPUS, "whichever engine and batch it was"
    assert samples(metrics, "vllm:kv_cache_usage_perc", "") == {"0": 0.0, "1": 0.0}
    served = samples(metrics, "vllm:request_success_total", 'finished_reason="length"')
    print(f"requests of each engine: {served}")
    assert set(served) == {"0", "1"} and min(served.values()) >= 3
    assert sum(served.values()) == 3 * len(bodies)


def samples(metrics, name, label):
    """Values of a metric by engine."""
    lines = [x for x in metrics.splitlines() if x.startswith(name + "{") and label in x]
    return {x.split('engine="')[1].split('"')[0]: float(x.rsplit(" ", 1)[1]) for x in lines}


KV_HEADS, GROUP, SIZE, LAYER = 8, 2, 64, 3


def cpu_pages(batch, heads, first_head, fields):
    """A layer's pages after a request's chunks and decodes, and the outputs, of some KV heads."""
    total, count = len(batch[0]), heads.stop - heads.start
    budget = resolve(
        fields, ServerConfig(seed=9), prompt_tokens=total, max_tokens=0, max_model_len=8192
    )
    blocks = -(-budget.reserved(total) // BLOCK)
    query, key, value = (x[:, heads].reshape(total, -1, SIZE).contiguous() for x in batch)
    cache = torch.full((blocks, count, BLOCK, 2 * SIZE), torch.nan)
    table = torch.arange(blocks, dtype=torch.int32).flip(0)[None].numpy()
    path = CpuPath(LAYER, first_head, count, GROUP, SIZE, Softmax(SIZE**-0.5))
    output, start = torch.empty_like(query), 0
    for length in [300, 150, *[1] * (total - 450)]:
        rows = slice(start, start + length)
        start += length
        plan = plan_batch(
            Batch([], [budget], np.array([0, length]), np.array([start])), table, BLOCK
        )
        path.forward(query[rows], key[rows], value[rows], cache, plan, output[rows])
    return cache, output


@pytest.mark.parametrize(
    "fields",
    [{"express_memory_tokens": 128}, {"express_memory_tokens": 256}, {"express_mode": "exact"}],
)
def test_halves_of_the_heads_decide_as_all_of_them(fields):
    """CPU kernels with the global index of a rank's first head: the same pages, bit for bit."""
    generator = torch.Generator().manual_seed(1)
    query = 2 * torch.randn(600, KV_HEADS, GROUP, SIZE, generator=generator)
    key, value = torch.randn(2, 600, KV_HEADS, 1, SIZE, generator=generator)
    batch = query, 1.5 * key, value
    pages, output = cpu_pages(batch, slice(0, KV_HEADS), 0, fields)
    output = output.view(-1, KV_HEADS, GROUP, SIZE)
    halves = [slice(0, KV_HEADS // 2), slice(KV_HEADS // 2, KV_HEADS)]
    for heads in halves:
        found, rows = cpu_pages(batch, heads, heads.start, fields)
        assert torch.equal(found.nan_to_num(7.0), pages[:, heads].nan_to_num(7.0))
        assert torch.allclose(
            rows.view(-1, KV_HEADS // 2, GROUP, SIZE), output[:, heads], atol=1e-5
        )
    local, _ = cpu_pages(batch, halves[1], 0, fields)  # what a rank's own indices would give
    same = torch.equal(local.nan_to_num(7.0), pages[:, halves[1]].nan_to_num(7.0))
    assert same == ("express_mode" in fields)


def test_parts_of_the_heads_in_the_interpreter():
    """The same of the Triton kernels; a process of its own, as in test_kernels.py."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         str(SUPPORT / "rank_cases.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "1 passed" in run.stdout
