"""Thousands of random schedules on vLLM's own scheduler, block pool and ours, without a model.

A made-up worker keeps, for every block, what would be in it.  Before a step computes anything for a
request, its blocks must hold exactly what a cold run would have left there; afterwards no block is
in two hands, none is lost, and the pool counts right.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
import tracemalloc
from collections import Counter

import pytest
from engines import engine_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from express_vllm.budget import resolve, unpack
from express_vllm.edge import GRANTED
from express_vllm.scheduler import prefixes, register_spec, reuse
from express_vllm.scheduler.scheduler import ExpressAsyncScheduler, ExpressScheduler
from express_vllm.scheduler.spec import ExpressSpec
from express_vllm.scheduler.states import kind_of
from express_vllm.settings import Settings

BLOCK = 16
BUDGETS = (
    {"express_memory_tokens": 160}, {"express_memory_tokens": 160, "express_seed": 7},
    {"express_memory_tokens": 256}, {"express_mode": "exact"},
)  # fmt: skip


@pytest.fixture(scope="module", params=["equal layers", "wide layers"])
def config(request, model_path):
    wide = {"wide_layers": [1]} if request.param == "wide layers" else {"wide_layers": []}
    express = {"max_memory_tokens": 512, "memory_tokens": 256, **wide}
    init_none_hash(sha256)
    register_spec()
    return engine_config(
        model_path, attention_backend="express", block_size=BLOCK, max_model_len=512,
        additional_config={"express": express}, max_num_seqs=6, max_num_batched_tokens=512,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def small_gains(monkeypatch):
    for module in (prefixes, reuse):
        monkeypatch.setattr(module, "LEAST_GAIN", 40)


class World:
    """A scheduler, and a worker that knows what is in every block."""

    def __init__(self, config, kind, blocks, budget_tokens):
        spec = ExpressSpec.of(
            FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=64, dtype="float32")
        )
        cache = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        config.cache_config.num_gpu_blocks = blocks
        self.scheduler = kind(
            vllm_config=config, kv_cache_config=cache, block_size=BLOCK, hash_block_size=BLOCK,
            structured_output_manager=StructuredOutputManager(config), log_stats=True,
        )  # fmt: skip
        self.scheduler.max_num_scheduled_tokens = budget_tokens
        self.settings = Settings.of(config)
        self.manager = self.scheduler.express_manager
        self.pool = self.manager.block_pool
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.contents, self.tables, self.tokens, self.salts = {}, {}, {}, {}
        self.outputs, self.hits, self.names = [], 0, 0

    def add(self, prompt, max_tokens, extra, salt=None, cold=False):
        budget = resolve(
            extra, self.settings, prompt_tokens=len(prompt), max_tokens=max_tokens
        )  # fmt: skip
        params = SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, extra_args={GRANTED: budget.packed}
        )
        name = str(self.names)
        self.names += 1
        request = Request(
            name, list(prompt), params, None, block_hasher=self.hasher, cache_salt=salt
        )
        request.skip_reading_prefix_cache = cold  # as for log-probabilities of the prompt
        self.salts[name] = salt
        self.scheduler.add_request(request)
        return name

    # What is in blocks

    def content(self, name, tokens, block):
        """What block number `block` of a request holds after `tokens` tokens."""
        budget, text, salt = (
            self.scheduler.express_budgets[name],
            self.tokens[name],
            self.salts[name],
        )
        if self.manager.shares and tokens <= budget.layout.plain_until:
            return ("text", salt, tuple(text[: min(tokens, (block + 1) * BLOCK)]))
        seed = None if budget.exact else budget.seed
        return ("state", salt, budget.shape, budget.wide, seed, tuple(text[:tokens]), block)

    def holds(self, name, tokens, block, found):
        wanted = self.content(name, tokens, block)
        if wanted[0] == "text" and found and found[0] == "text":  # a shared block may hold more
            return found[1] == wanted[1] and found[2][: len(wanted[2])] == wanted[2]
        return found == wanted

    def step(self):
        scheduler = self.scheduler
        output = scheduler.schedule()
        copies = [
            (copy.dst_block_id, self.contents.get(copy.src_block_id))
            for copy in output.kv_cache_block_copies or ()
        ]
        assert len({block for block, _ in copies}) == len(copies)
        self.contents.update(copies)
        fresh = {new.req_id for new in output.scheduled_new_reqs}
        fresh |= output.scheduled_cached_reqs.resumed_req_ids
        starts, sampled = {}, []
        for name, count in output.num_scheduled_tokens.items():
            request = scheduler.requests[name]
            start = starts[name] = request.num_computed_tokens - count
            blocks = [block.block_id for block in self.manager.req_to_blocks[name]]
            if name in fresh:
                self.tokens[name] = list(request.all_token_ids)
                self.hits += start > 0
                assert not (start and request.skip_reading_prefix_cache)
            else:
                assert blocks[: len(self.tables[name])] == self.tables[name]  # only appended
            self.tables[name] = blocks
            budget = scheduler.express_budgets[name]
            assert len(blocks) == cdiv(budget.reserved(start + count), BLOCK)
            for i in range(cdiv(budget.reserved(start), BLOCK)):
                found = self.contents.get(blocks[i])
                assert self.holds(name, start, i, found), (name, start, i, found)
        for name, count in output.num_scheduled_tokens.items():
            stop = starts[name] + count
            assert stop <= len(self.tokens[name])
            first = starts[name] // BLOCK if self.manager.shared(name) else 0
            for i, block in enumerate(self.tables[name][first:], first):
                self.contents[block] = self.content(name, stop, i)
            text = self.tokens[name]
            new = [hash(tuple(text[-3:])) % 2] if stop == len(text) else []
            text.extend(new)
            sampled.append(new)
        names = list(output.num_scheduled_tokens)
        index = {name: i for i, name in enumerate(names)}
        self.outputs.append((output, ModelRunnerOutput(names, index, sampled)))
        self.check()

    def deliver(self):
        output, result = self.outputs.pop(0)
        self.scheduler.update_from_output(output, result)

    def check(self):
        """Every block is free or held, by as many as say so."""
        held = Counter(
            block.block_id for blocks in self.manager.req_to_blocks.values() for block in blocks
        )
        queue = self.pool.free_block_queue.get_all_free_blocks()
        free = {block.block_id for block in queue}
        assert len(free) == len(queue) == self.pool.get_num_free_blocks()
        for block in self.pool.blocks:
            assert block.is_null or block.ref_cnt == held[block.block_id]
            assert block.is_null or (block.block_id in free) == (block.ref_cnt == 0)
        for name, blocks in self.manager.req_to_blocks.items():
            if not self.manager.shared(name):
                assert all(block.ref_cnt == 1 and block.block_hash is None for block in blocks)
        assert len(self.manager.states) <= len(self.pool.blocks)


def play(config, kind, seed):
    """Requests, aborts and steps at random; -> how many requests started from something cached."""
    rng = random.Random(seed)
    world = World(config, kind, rng.choice((36, 60, 140)), rng.choice((33, 64, 200, 512)))
    stems = [[rng.randrange(3, 9) for _ in range(rng.randrange(60, 300))] for _ in range(2)]
    depth = 2 if kind is ExpressAsyncScheduler else 1
    budgets = rng.sample(BUDGETS, 2) if rng.random() < 0.7 else BUDGETS[:2]
    for _ in range(rng.randrange(40, 160)):
        action = rng.random()
        if action < 0.25 and len(world.scheduler.requests) < 8:
            stem = rng.choice(stems)
            prompt = stem[: rng.choice((rng.randrange(1, len(stem)), len(stem)))]
            prompt = prompt + [rng.randrange(3, 9) for _ in range(rng.randrange(0, 30))]
            if world.tokens and rng.random() < 0.4:  # a conversation goes on
                prompt = [*rng.choice(list(world.tokens.values())), *prompt[:20]]
            count = rng.randrange(1, 60)
            prompt = prompt[: 340 - count]
            world.add(
                prompt,
                count,
                rng.choice(budgets),
                rng.choice((None, None, "b")),
                rng.random() < 0.1,
            )
        elif action < 0.3 and world.scheduler.requests:
            name = rng.choice(list(world.scheduler.requests))
            world.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
            world.check()
        else:
            world.step()
            while len(world.outputs) >= depth:
                world.deliver()
    for _ in range(2000):
        if not world.scheduler.has_unfinished_requests() and not world.outputs:
            break
        if world.scheduler.has_unfinished_requests():
            world.step()
        while world.outputs and (
            len(world.outputs) >= depth or not world.scheduler.has_unfinished_requests()
        ):
            world.deliver()
    assert not world.scheduler.has_unfinished_requests(), "requests wait for ever"
    assert not world.scheduler.express_budgets
    assert world.pool.get_num_free_blocks() == len(world.pool.blocks) - 1
    assert world.scheduler.reset_prefix_cache()
    assert all(block.block_hash is None for block in world.pool.blocks)
    return world.hits


@pytest.mark.parametrize(("new", "most"), [(100, 140), (1, 400)])
def test_hashes_of_prompts_take_little_memory_and_not_ever_more(config, monkeypatch, new, most):
    """Bytes of a hash, by how many new ones a prompt has; every request brings its own budget."""
    monkeypatch.setattr(prefixes, "MOST_HASHES", 8192)
    settings = Settings.of(config)
    packed = resolve(BUDGETS[2], settings, prompt_tokens=400, max_tokens=9).packed
    seen, taken = prefixes.Prefixes(), []

    def add(count):
        for number in range(count // new):
            kind = kind_of(unpack(packed, settings, 409))
            hashes = [sha256((count, number, i)) for i in range(new)]
            seen.add(kind, hashes, f"cmpl-{count}-{number:032d}")
        taken.append(tracemalloc.get_traced_memory()[0])

    kind_of(unpack(packed, settings, 409))  # the layout is shared
    tracemalloc.start()
    try:
        for count in (0, 8200, 16400):
            add(count)
    finally:
        tracemalloc.stop()
    assert (taken[1] - taken[0]) / 8192 < most
    assert taken[2] < 1.5 * taken[1]  # the dictionary may be twice as large


def test_a_long_prompt_is_remembered_as_fast_when_old_ones_go():
    """In the engine's loop, where every request waits; 6,000 blocks are some 100,000 tokens."""
    fresh, full = prefixes.Prefixes(), prefixes.Prefixes()
    numbers = itertools.count()

    def seconds(seen):
        hashes = [sha256(next(numbers)) for _ in range(6000)]
        start = time.perf_counter()
        seen.add("kind", hashes, "name")
        return time.perf_counter() - start

    full.add("kind", [sha256(-1 - i) for i in range(prefixes.MOST_HASHES)], "old")
    first = statistics.median(seconds(fresh) for _ in range(9))
    assert statistics.median(seconds(full) for _ in range(9)) < 8 * first


@pytest.mark.parametrize("examples", [120, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [ExpressScheduler, ExpressAsyncScheduler])
def test_random_schedules(config, kind, examples):
    hits = []

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 1 << 32))
    def run(seed):
        hits.append(play(config, kind, seed))

    run()
    print(f"{sum(hits)} requests started from cached states in {len(hits)} schedules")
    assert sum(hits) > len(hits)  # about two in each
