"""One layer on the CPU path, over real pages: against the oracle, and whatever the chunking."""

import pytest
import torch
from budgets import resolve
from cpu_layer import GROUP, KV_HEADS, Runner, chunks, drive, make_batch
from softmaxes import random_softmax

from express_vllm.config import ServerConfig
from express_vllm.layout import layout_for
from express_vllm.reference.cache import ExpressCache


@pytest.mark.parametrize(
    ("head_size", "dtype", "options"),
    [
        (64, torch.float32, {}),
        (64, torch.float32, {"exponent": 0.5}),
        (96, torch.bfloat16, {}),
        (33, torch.float32, {}),
        (120, torch.bfloat16, {}),
        (128, torch.float16, {}),
        (256, torch.float32, {"schedule": "paper"}),
        (64, torch.float32, {"pinned": 60}),
        (64, torch.float32, {"schedule": "paper", "pinned": 60}),
        (33, torch.float32, {"cap": 3.0, "total": 330}),
        (96, torch.bfloat16, {"sinks": 8.0, "total": 330}),
        (128, torch.float32, {"cap": 4.0, "sinks": 6.0, "exponent": 0.5, "total": 330}),
        (256, torch.float16, {"cap": 4.0, "sinks": 6.0, "total": 330}),
    ],
)
def test_equals_the_oracle(head_size, dtype, options):
    options = dict(options)
    total = options.pop("total", 700)
    batch = make_batch(total, head_size, 0, dtype)
    softmax = random_softmax(
        head_size, KV_HEADS * GROUP, options.pop("cap", 0.0), options.pop("sinks", None), dtype
    )
    runner = Runner(head_size, dtype, 16, softmax=softmax)
    sequence = runner.start(batch, memory_tokens=192)
    sequence.budget = resolve(
        {"express_memory_tokens": 192, "express_pinned_tokens": options.pop("pinned", None)},
        ServerConfig(seed=9, **options),
        prompt_tokens=total,
        max_tokens=0,
        max_model_len=8192,
    )
    outputs = drive(runner, sequence, [*chunks(total - 200, 90), *[1] * 200]).double()
    layout = sequence.budget.layout
    for head in range(KV_HEADS):
        oracle = ExpressCache(
            layout_for(layout.shape),
            head_size,
            seed=9,
            layer=3,
            kv_head=4 + head,
            softmax=softmax.of_kv_head(head, KV_HEADS),
            row_dtype=dtype,
        )
        query = batch[0].view(total, KV_HEADS, GROUP, head_size)[:, head].double()
        expected = oracle.extend(query, batch[1][:, head].double(), batch[2][:, head].double())
        kept = runner.slots(sequence)[head, :, :head_size]
        agree = (batch[1][oracle.positions, head] == kept).all(-1).float().mean()
        assert agree == 1.0
        ours = outputs.view(total, KV_HEADS, GROUP, head_size)[:, head]
        assert (ours - expected).norm() < 4e-3 * expected.norm()
        if dtype == torch.float32:
            assert torch.allclose(ours, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", [192, 512])
def test_cache_is_bit_identical_for_any_chunking(dtype, memory):
    total = 1200
    batch = make_batch(total, 64, 3, dtype)
    states = []
    ways = [
        [total],
        chunks(total, 256),
        chunks(total, 37),
        [*chunks(800, 111), *[1] * 400],
        [1] * total,
        [1, 600, 1, 1, 597],
    ]
    for steps in ways:
        runner = Runner(64, dtype, 32)
        sequence = runner.start(batch, memory_tokens=memory)
        outputs = drive(runner, sequence, steps)
        assert outputs.isfinite().all(), "no poisoned slot was read"
        states.append(runner.slots(sequence))
    assert all(torch.equal(states[0], other) for other in states[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pinned_slots_are_the_first_tokens_bit_for_bit(dtype):
    """After many events, whatever the chunks; what is stored of an exact request says so."""
    total, batch = 3000, make_batch(3000, 64, 11, dtype)
    exact = Runner(64, dtype, 32, pages=128)
    whole = exact.start([x[:240] for x in batch], mode="exact")
    drive(exact, whole, chunks(240, 100))
    for steps in ([*chunks(2900, 333), *[1] * 100], chunks(total, 512)):
        runner = Runner(64, dtype, 32)
        sequence = runner.start(batch, memory_tokens=512, pinned_tokens=230)
        assert drive(runner, sequence, steps).isfinite().all()
        assert sequence.budget.compactions(total) > 60
        pinned = sequence.budget.pinned(total)
        assert pinned == 240
        assert torch.equal(runner.slots(sequence)[:, :pinned], exact.slots(whole))


def test_mixed_batches_do_not_change_a_sequence():
    batches = [make_batch(600, 64, seed) for seed in range(5)]
    fields = [
        {"memory_tokens": 192},
        {"mode": "exact"},
        {"memory_tokens": 256, "seed": 3},
        {"memory_tokens": 512, "profile": "even"},
        {"memory_tokens": 512, "pinned_tokens": 200},
    ]
    alone = []
    for batch, asked in zip(batches, fields, strict=True):
        runner = Runner(64, torch.float32, 16)
        sequence = runner.start(batch, **asked)
        outputs = drive(runner, sequence, [*chunks(400, 80), *[1] * 200])
        alone.append((runner.slots(sequence).clone(), outputs))
    runner = Runner(64, torch.float32, 16, pages=192)
    sequences = [runner.start(b, **f) for b, f in zip(batches, fields, strict=True)]
    mixed = [[] for _ in sequences]
    turn = 0
    while any(s.stored < 600 for s in sequences):
        work = []
        for i, s in enumerate(sequences):
            left = 600 - s.stored
            if left and (turn + i) % 3:
                work.append((s, min(left, 1 if s.stored >= 400 else (50, 1, 77)[(turn + i) % 3])))
        if work:
            for (s, _), out in zip(work, runner.step(work), strict=True):
                mixed[sequences.index(s)].append(out)
        turn += 1
    for sequence, parts, (state, outputs) in zip(sequences, mixed, alone, strict=True):
        assert torch.equal(runner.slots(sequence), state)
        assert torch.allclose(torch.cat(parts), outputs, rtol=1e-4, atol=1e-5)


def test_a_fitting_budget_is_exact_attention():
    batch = make_batch(300, 64, 5)
    runner = Runner(64, torch.float32, 16)
    outputs = drive(runner, runner.start(batch, memory_tokens=512), [*chunks(200, 64), *[1] * 100])
    other = Runner(64, torch.float32, 16)
    exact = drive(other, other.start(batch, mode="exact"), [*chunks(200, 64), *[1] * 100])
    assert torch.equal(outputs, exact)
    query, key, value = (x.double().transpose(0, 1)[None] for x in batch)
    truth = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )[0].transpose(0, 1)
    assert torch.allclose(outputs.double(), truth, rtol=1e-4, atol=1e-5)
