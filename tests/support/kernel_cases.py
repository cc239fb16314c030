"""The Triton kernels against the oracle; `test_kernels.py` says where these cases run."""

import math
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from softmaxes import random_softmax

from express_vllm import rng
from express_vllm.backend.chunk import Chunk
from express_vllm.backend.gpu.joint import joint_softmax
from express_vllm.backend.kernels import constants, decode, reference, scratch, step
from express_vllm.backend.kernels.constants import QUERY_ROWS, Model
from express_vllm.backend.kernels.events import Kind
from express_vllm.backend.kernels.memory import Memory, Workspace
from express_vllm.backend.kernels.rows import event_key, mix
from express_vllm.backend.kernels.selection import choose_heavy, weigh
from express_vllm.backend.kernels.step import Span, StepPlan, Tuning
from express_vllm.backend.kernels.team import Team
from express_vllm.layout import Layout
from express_vllm.reference.cache import ExpressCache
from express_vllm.shape import EXACT_SHAPE, RING_ROWS, make_shape
from express_vllm.softmax import Softmax

torch.set_num_threads(1)  # small tensors, often several processes
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEED, LAYER, FIRST_HEAD = 2**33 + 5, 3, 4


class Runner:
    """One layer of requests of one cache shape over poisoned, shuffled pages."""

    def __init__(self, layout, dtype, head_size, *, heads=2, group=3, block_size=16, requests=1,
                 tokens=4096, softmax=None):  # fmt: skip
        self.layout, self.heads, self.group, self.size = layout, heads, group, head_size
        blocks = -(-min(layout.shape.slots, tokens) // block_size)
        pages = requests * blocks + 3
        self.cache = torch.full(
            (pages, heads, block_size, 2 * head_size), torch.nan, dtype=dtype, device=DEVICE
        )
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(1))
        self.table = order[: requests * blocks].view(requests, blocks).int().to(DEVICE)
        self.stored = [0] * requests
        self.softmax = softmax or Softmax(head_size**-0.5)
        self.zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def prefill(self, batch, counts):
        """Process counts[r] further tokens of each request; batch: q, k, v of the step's tokens."""
        chunks, token = [], 0
        for r, count in enumerate(counts):
            if count:
                start = self.stored[r]
                chunks.append(Chunk(self.layout, start, start + count, token, r, SEED + r))
                self.stored[r] += count
            token += count
        plan = StepPlan.make(chunks, self.group, DEVICE)
        output = torch.full_like(batch[0], torch.nan)
        step.run_chunks(
            plan, *batch, self.cache, self.table, LAYER, FIRST_HEAD, self.softmax, output
        )
        return output

    def decode(self, batch):
        """One further token of every request."""
        due = [
            Chunk(self.layout, n, n + 1, 0, r, SEED + r)
            for r, n in enumerate(self.stored)
            if self.layout.events(n, n + 1)
        ]
        if due:
            plan = StepPlan.make(due, self.group, DEVICE, compacting=True)
            step.compact_pages(
                plan, self.cache, self.zero, self.zero + LAYER, self.table, FIRST_HEAD,
                self.softmax, self.group,
            )  # fmt: skip
        query, key, value = batch
        live, rings, starts, steps = [], [], [], []
        shape = self.layout.shape
        for n in self.stored:
            live.append(self.layout.live(n + 1))
            row = self.layout.ring_row(n)
            rings.append(decode.ring_word(self.layout.ring_start, row) if row >= 0 else -1)
            first, rise = decode.segment_steps(self.layout.segments(n + 1))
            starts.append(torch.from_numpy(first))
            steps.append(torch.from_numpy(rise))
        live, ring = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (live, rings))
        decode.store_tokens(query, key, value, self.cache, self.table, live, ring)
        output = torch.full_like(query, torch.nan)
        scratch = decode.DecodeScratch(len(live), query.shape[1], self.size, shape.slots, DEVICE)
        scratch.part.fill_(torch.nan)
        decode.decode_attention(
            query, self.cache, self.table, live, torch.stack(starts).to(DEVICE),
            torch.stack(steps).to(DEVICE), self.softmax, scratch, output,
        )  # fmt: skip
        self.stored = [n + 1 for n in self.stored]
        return output

    def slots(self, r):
        """Live rows of request r, [KV heads, live, 2 d]."""
        rows = self.cache[self.table[r].long()].transpose(0, 1).flatten(1, 2)
        return rows[:, : self.layout.live(self.stored[r])]


def tokens(count, heads, group, size, dtype, seed=0):
    """Random queries [T, heads, d] and keys, values [T, KV heads, d]."""
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(count, heads * group, size, generator=generator)
    key, value = torch.randn(2, count, heads, size, generator=generator)
    return [x.to(dtype).to(DEVICE) for x in (query, 1.5 * key, value)]


def oracle(layout, batch, heads, group, seed=SEED, softmax=None):
    """Outputs [T, heads, d] in fp64, and the kept positions of each KV head."""
    query, key, value = (x.double().cpu() for x in batch)
    size = query.shape[2]
    outputs, caches = [], []
    softmax = softmax or Softmax(size**-0.5)
    for h in range(heads):
        cache = ExpressCache(
            layout, size, seed=seed, layer=LAYER, kv_head=FIRST_HEAD + h, row_dtype=batch[0].dtype,
            softmax=softmax.of_kv_head(h, heads),
        )  # fmt: skip
        rows = query.view(-1, heads, group, size)[:, h]
        outputs.append(cache.extend(rows, key[:, h], value[:, h]))
        caches.append(cache)
    return torch.stack(outputs, 1).flatten(1, 2), caches


def error(ours, expected):
    difference = (ours.double().cpu() - expected).norm() / expected.norm()
    return float(difference) if math.isfinite(difference) else math.inf


def kept_share(runner, batch, caches, r=0):
    """Share of live slots that hold the token that the oracle keeps there."""
    ours = runner.slots(r)
    same = [
        (ours[h, :, : runner.size] == batch[1][cache.positions.to(DEVICE), h]).all(-1)
        for h, cache in enumerate(caches)
    ]
    together = torch.cat(same)
    return int(together.sum()) / len(together)  # a mean on a GPU may miss 1.0 by rounding


def chunks(total, size):
    return [min(size, total - at) for at in range(0, total, size)]


def softmax_of(options, size, heads, dtype):
    """Takes a soft cap and the sinks' mean out of `options`."""
    cap, sinks = options.pop("cap", 0.0), options.pop("sinks", None)
    return random_softmax(size, heads, cap, sinks, dtype, DEVICE)


def drive(runner, batch, counts):
    outputs, at = [], 0
    for count in counts:
        part = [x[at : at + count] for x in batch]
        outputs.append(runner.decode(part) if count == 1 else runner.prefill(part, [count]))
        at += count
    return torch.cat(outputs)


@triton.jit
def bits_kernel(out, low, high, layer, head, position, op, stream):
    key = event_key(
        low.to(tl.uint32), high.to(tl.uint32), layer.to(tl.uint32), head.to(tl.uint32),
        position.to(tl.uint32),
    )  # fmt: skip
    o = tl.arange(0, 16)
    state = mix(mix(key, op.to(tl.uint32)), stream.to(tl.uint32))
    tl.store(out + o, mix(tl.zeros([16], tl.uint32) + state, o.to(tl.uint32)).to(tl.int64))


def test_random_bits_equal_the_oracle():
    for seed, layer, head, position in [(0, 0, 0, 0), (2**63 + 7, 79, 127, 2**30), (5, 1, 2, 3)]:
        out = torch.empty(16, dtype=torch.int64, device=DEVICE)
        words = (seed & 0xFFFFFFFF, seed >> 32, layer, head, position, 6, rng.STREAM_SIGN)
        # Tensors of int64, so that no word is specialised to a constant.
        words = torch.tensor(words, dtype=torch.int64, device=DEVICE)
        unpack_kernel[(1,)](words, out)
        key = rng.key(seed, layer, head, position)
        assert out.tolist() == [rng.bits(key, 6, rng.STREAM_SIGN, i) for i in range(16)]


@triton.jit
def unpack_kernel(words, out):
    bits_kernel(
        out, tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3),
        tl.load(words + 4), tl.load(words + 5), tl.load(words + 6),
    )  # fmt: skip


@triton.jit
def choose_kernel(
    score, part, near, total, bits, virtual, recent, stored, incoming, sinks, heavy,
    C: tl.constexpr,
):  # fmt: skip
    weigh(score, part, near, total, bits, heavy + incoming, Team(0, 1, bits), C)
    tl.debug_barrier()
    choose_heavy(bits, virtual, recent, stored, incoming, sinks, heavy, C)


@pytest.mark.parametrize(
    ("heavy", "incoming", "scale", "values"),
    [(5, 20, 1.0, 100), (64, 600, 1.0, 3), (64, 600, 1e-9, 1000), (600, 500, 100.0, 9)],
)
def test_the_heaviest_candidates_stay_and_ties_keep_the_first(heavy, incoming, scale, values):
    """Masses inside and outside the octaves of the first pass, more of them than registers hold."""
    sinks, stored, recent, count = 4, heavy + 10, 1000, heavy + incoming
    generator = torch.Generator().manual_seed(0)
    mass = scale * torch.randint(1, values + 1, (count,), generator=generator).float()
    score = (mass / RING_ROWS).log()[:, None].expand(count, RING_ROWS).contiguous()
    part = torch.full((8, 2, RING_ROWS), -1e30)
    part[:, 1] = 0.0
    virtual = torch.arange(stored + incoming, dtype=torch.int32)
    entries = torch.cat([virtual[sinks : sinks + heavy], torch.arange(incoming) + stored + recent])
    near, total, bits = torch.zeros(RING_ROWS), torch.ones(RING_ROWS), torch.zeros(2048)
    moved = [x.to(DEVICE) for x in (score, part, near, total, bits.int(), virtual)]
    variant = constants.compaction(Kind(True, False, "gaussian"), Model(64, 1, 4, 16), False)
    choose_kernel[(1,)](
        *moved, recent, stored, incoming, sinks, heavy, variant.constants, num_warps=8
    )
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[mass.sort(descending=True, stable=True).indices[:heavy]] = True
    ours = moved[5].cpu()
    assert torch.equal(ours[sinks : sinks + heavy].long(), entries[chosen])
    assert torch.equal(ours[stored:].long(), entries[~chosen])


@pytest.mark.parametrize(
    ("options", "slots", "size", "group", "counts"),
    [
        ({}, 128, 64, 2, [63, 65, 111, *[1] * 9]),
        ({"exponent": 0.5}, 128, 64, 2, [200, *[1] * 35]),
        ({"schedule": "paper"}, 128, 64, 1, [64, 137, *[1] * 35]),
        ({}, 128, 120, 1, [113, 31, 1]),
        ({}, 128, 72, 2, [113, 31, 1]),
        ({"pinned": 200}, 512, 64, 2, [400, 111, 143, *[1] * 9]),
        ({"pinned": 370}, 512, 64, 1, [497, 60, *[1] * 9]),
        ({"schedule": "paper", "pinned": 60}, 192, 64, 1, [150, 143, *[1] * 9]),
        ({"cap": 3.0}, 128, 64, 2, [113, 31, 1]),
        ({"sinks": 8.0}, 128, 72, 3, [113, 31, 1]),
    ],
)
def test_a_request_equals_the_oracle(options, slots, size, group, counts):
    heads, total, options = 1, sum(counts), dict(options)
    softmax = softmax_of(options, size, heads * group, torch.float32)
    layout = Layout(make_shape(slots, **options))
    batch = tokens(total, heads, group, size, torch.float32)
    runner = Runner(layout, torch.float32, size, heads=heads, group=group, softmax=softmax)
    outputs = drive(runner, batch, counts)
    expected, caches = oracle(layout, batch, heads, group, softmax=softmax)
    assert kept_share(runner, batch, caches) == 1.0
    assert error(outputs, expected) < 1e-5


def test_groups_longer_than_a_tile_equal_the_oracle():
    """The published schedule's first event halves 320 and 160 entries: psi crosses tiles."""
    layout = Layout(make_shape(512, schedule="paper"))
    assert max(op.length for op in layout.event(0).ops) > 128
    total = layout.shape.first_event + 1
    batch = tokens(total, 1, 1, 64, torch.float32, seed=8)
    runner = Runner(layout, torch.float32, 64, heads=1, group=1)
    outputs = drive(runner, batch, [total])
    expected, caches = oracle(layout, batch, 1, 1)
    assert kept_share(runner, batch, caches) == 1.0
    assert error(outputs, expected) < 1e-5


def test_any_chunking_and_batch_keep_the_identical_cache():
    layout = Layout(make_shape(128))
    batches = [tokens(170, 1, 2, 64, torch.float16, seed=s) for s in range(2)]
    states = []
    for counts in ([170], [100, 69, 1], [127, *[1] * 3, 40]):
        runner = Runner(layout, torch.float16, 64, heads=1, group=2)
        outputs = drive(runner, batches[0], counts)
        assert outputs.isfinite().all(), "no poisoned slot was read"
        states.append(runner.slots(0))
    runner = Runner(layout, torch.float16, 64, heads=1, group=2, requests=2)
    for counts in ((0, 90), (111, 1), (59, 79)):
        parts = [
            torch.cat([b[i][n : n + c] for b, n, c in zip(batches, runner.stored, counts,
                                                         strict=True)])
            for i in range(3)
        ]  # fmt: skip
        runner.prefill(parts, counts)
    states.append(runner.slots(0))
    assert all(torch.equal(states[0], other) for other in states[1:])


@pytest.mark.parametrize(
    ("size", "group", "block_size", "dtype", "options"),
    [
        (64, 1, 16, torch.float16, {}),
        (96, 3, 32, torch.float32, {}),
        (128, 4, 64, torch.float16, {}),
        (256, 8, 128, torch.float16, {}),
        (120, 2, 16, torch.float32, {}),
        (72, 3, 32, torch.float16, {}),
        (64, 3, 32, torch.float32, {"sinks": 6.0}),
        (128, 2, 16, torch.float16, {"cap": 1.0, "sinks": 5.0}),
    ],
)
def test_decode_equals_the_reference(size, group, block_size, dtype, options):
    """Random layouts; slots and splits that hold nothing are poisoned; one padding request."""
    layouts = [Layout(make_shape(640, schedule=s)) for s in ("lazy", "paper")]
    counts = [1, 63, 64, 65, 111, 2047, 5000]
    heads, requests = 1, len(counts) + 1
    softmax = softmax_of(dict(options), size, heads * group, dtype)
    blocks = -(-640 // block_size)
    cache = torch.full(
        (requests * blocks, heads, block_size, 2 * size), torch.nan, dtype=dtype, device=DEVICE
    )
    order = torch.randperm(requests * blocks, generator=torch.Generator().manual_seed(2))
    table = order.view(requests, blocks).int().to(DEVICE)
    query = torch.randn(requests, heads * group, size).to(dtype).to(DEVICE)
    live, starts, steps, expected = [], [], [], []
    for r, count in enumerate(counts):
        segments = layouts[r % 2].segments(count)
        live.append(sum(s.length for s in segments))
        rows = torch.randn(live[-1], heads, 2 * size).to(dtype).to(DEVICE)
        slot = torch.arange(live[-1], device=DEVICE)
        cache[table[r].long()[slot // block_size], :, slot % block_size] = rows
        first, rise = decode.segment_steps(segments)
        starts.append(torch.from_numpy(first))
        steps.append(torch.from_numpy(rise))
        expected.append(reference.decode_attention(query[r], cache, table[r], segments, softmax))
    empty = decode.segment_steps([])
    starts.append(torch.from_numpy(empty[0]))
    steps.append(torch.from_numpy(empty[1]))
    expected.append(torch.zeros_like(expected[0]))
    scratch = decode.DecodeScratch(requests, heads * group, size, 640, DEVICE)
    scratch.part.fill_(torch.nan)
    scratch.norm.fill_(torch.nan)
    output = torch.full_like(query, torch.nan)
    decode.decode_attention(
        query, cache, table, torch.tensor([*live, 0], dtype=torch.int32, device=DEVICE),
        torch.stack(starts).to(DEVICE), torch.stack(steps).to(DEVICE), softmax, scratch, output,
    )  # fmt: skip
    assert error(output, torch.stack(expected)) < (1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize(
    ("size", "group", "dtype", "options"),
    [(64, 1, torch.float32, {}), (96, 3, torch.float16, {}), (128, 4, torch.float32, {}),
     (256, 2, torch.float16, {}), (120, 2, torch.float32, {}), (72, 2, torch.float16, {}),
     (96, 3, torch.float32, {"cap": 3.0, "sinks": 5.0})],
)  # fmt: skip
def test_exact_prefill_equals_the_reference(size, group, dtype, options):
    """Odd lengths in one plan, then a further chunk of one request over its pages."""
    layout = Layout(make_shape(256))
    counts = [1, 63, 65, 111]
    batches = [tokens(n + 9, 1, group, size, dtype, seed=n) for n in counts]
    softmax = softmax_of(dict(options), size, group, torch.float16)
    runner = Runner(
        layout, dtype, size, heads=1, group=group, requests=4, tokens=256, softmax=softmax
    )
    parts = [torch.cat([b[i][:n] for b, n in zip(batches, counts, strict=True)]) for i in range(3)]
    output = runner.prefill(parts, counts)
    more = runner.prefill([x[1:10] for x in batches[0]], [9, 0, 0, 0])
    limit = 1e-5 if dtype == torch.float32 else 2e-3
    for batch, part in zip(batches, output.split(counts), strict=True):
        expected = reference.exact_attention(*batch, runner.softmax)
        assert error(part, expected[: len(part)]) < limit
    assert error(more, reference.exact_attention(*batches[0], runner.softmax)[1:]) < limit


@pytest.mark.parametrize("sinks", [None, 3.0])
def test_decode_steps_compact_every_layer_alike(sinks):
    """One launch for several layers and requests, in place, equals one layer at a time; each has
    sinks of its own."""
    layout = Layout(make_shape(128))
    event = layout.event(2)
    layers, heads, group, size = 2, 1, 2, 64
    pages = torch.randn(layers, 20, heads, 16, 2 * size).to(DEVICE)
    table = torch.randperm(20)[:16].view(2, 8).int().to(DEVICE)
    at = event.position
    chunks = [Chunk(layout, at, at + 1, 0, r, SEED + r) for r in range(2)]
    plan = StepPlan.make(chunks, group, DEVICE, compacting=True)
    alone, swapped = pages.clone(), pages.clone()
    zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    own = [random_softmax(size, 2, 0.0, sinks, device=DEVICE, seed=s) for s in range(layers)]
    joint = joint_softmax([SimpleNamespace(scale=x.scale, soft_cap=0.0, sinks=x.sinks)
                           for x in own])  # fmt: skip

    def compact(cache, offsets, ids, softmax):
        step.compact_pages(plan, cache, offsets, ids, table, FIRST_HEAD, softmax, group)

    for layer in range(layers):
        compact(alone[layer], zero, zero + layer, own[layer])
    offsets = torch.arange(layers, device=DEVICE) * pages[0].numel()
    compact(pages[0], offsets, torch.arange(layers, device=DEVICE), joint)
    assert torch.equal(pages, alone)
    if sinks is not None:
        compact(swapped[1], zero, zero + 1, own[0])
        assert not torch.equal(swapped[1], alone[1]), "sinks decide something"


def test_first_and_later_events_of_a_batch_decide_as_alone():
    """The first event has more candidates: what it computes must not depend on its neighbours."""
    layout = Layout(make_shape(128))
    group, size = 2, 64
    pages = torch.randn(20, 1, 16, 2 * size).to(DEVICE)
    table = torch.randperm(20)[:16].view(2, 8).int().to(DEVICE)
    positions = [layout.event(0).position, layout.event(3).position]
    chunks = [Chunk(layout, n, n + 1, 0, r, SEED + r) for r, n in enumerate(positions)]
    alone = pages.clone()
    zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def run(cache, some):
        plan = StepPlan.make(some, group, DEVICE, compacting=True)
        step.compact_pages(plan, cache, zero, zero, table, FIRST_HEAD, Softmax(0.125), group)

    for chunk in chunks:
        run(alone, [chunk])
    run(pages, chunks)
    assert torch.equal(pages, alone)


def mixed():
    """Two layouts of one kind and different sizes, and one of a request that keeps every token."""
    shapes = make_shape(128), make_shape(144, profile="even"), EXACT_SHAPE
    return [Layout(shape) for shape in shapes]


class Batch:
    """Requests of different layouts over pages of one pool; every slot's page is poisoned."""

    def __init__(self, layouts, group, size, slots, dtype=torch.float32):
        self.layouts, self.group, self.size = layouts, group, size
        blocks = -(-slots // 16)
        pages = len(layouts) * blocks
        self.cache = torch.full((pages, 1, 16, 2 * size), torch.nan, dtype=dtype, device=DEVICE)
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(1))
        self.table = order.view(len(layouts), blocks).int().to(DEVICE)

    def chunks(self, starts, stops):
        found, at = [], 0
        for r, (layout, start, stop) in enumerate(zip(self.layouts, starts, stops, strict=True)):
            found.append(Chunk(layout, start, stop, at, r, SEED + r))
            at += stop - start
        return found

    def run(self, plans, batch, output):
        for plan in plans:
            step.run_chunks(
                plan, *batch, self.cache, self.table, LAYER, FIRST_HEAD, Softmax(0.125), output
            )  # fmt: skip

    def compact(self, plans):
        zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        for plan in plans:
            step.compact_pages(
                plan, self.cache, zero, zero + LAYER, self.table, FIRST_HEAD, Softmax(0.125),
                self.group,
            )  # fmt: skip


def test_requests_of_different_budgets_share_launches_and_decide_as_alone():
    """A chunk, then a decode's event each, in one plan: the same bits as in plans of their own."""
    layouts, group, size = mixed(), 2, 32
    stops = [layouts[0].event(1).position, layouts[1].event(0).position, 20]
    data = tokens(sum(stops), 1, group, size, torch.float32)
    found = []
    for alone in (True, False):
        batch, output = Batch(layouts, group, size, 160), torch.full_like(data[0], torch.nan)
        chunked = batch.chunks([0] * 3, stops)
        plans = [StepPlan.make(some, group, DEVICE) for some in parted(chunked, alone)]
        batch.run(plans, data, output)
        due = decoding(layouts, stops)
        batch.compact(
            [StepPlan.make(c, group, DEVICE, compacting=True) for c in parted(due, alone)]
        )
        found.append((output, batch.cache.nan_to_num(7.0)))
    assert found[0][0].isfinite().all()
    for apart, together in zip(*found, strict=True):
        assert torch.equal(apart, together)


def parted(chunked, alone):
    return [[c] for c in chunked] if alone else [chunked]


def decoding(layouts, counts):
    """The event that is due at each request's next token."""
    pairs = enumerate(zip(layouts, counts, strict=True))
    return [
        Chunk(x, n, n + 1, 0, r, SEED + r) for r, (x, n) in pairs if x.events(n, n + 1)
    ]  # fmt: skip


def test_plans_that_are_cut_to_their_scratch_leave_the_same_bits():
    """By requests and by tokens, across first and later events; then decodes' events in scratch
    that holds few programs.  Nothing takes more than its workspace."""
    layouts, group, size = mixed(), 2, 32
    side = scratch.Side(Model(size, group, 4, 16), 1, DEVICE)
    stops = [layouts[0].event(1).position, layouts[1].event(0).position, 20]
    data = tokens(sum(stops), 1, group, size, torch.float32, seed=3)
    # Little more than one token's events take: teams have more programs on a GPU.
    small = 75_000 if DEVICE.type == "cuda" else 65_000
    found = []
    for limit, decode_limit in ((1 << 30, 1 << 30), (small, 200_000)):
        batch, output = Batch(layouts, group, size, 160), torch.full_like(data[0], torch.nan)
        spans = map(Span.of, batch.chunks([0] * 3, stops))
        workspace = Workspace(limit, DEVICE)
        plans = [StepPlan.of(some, DEVICE, QUERY_ROWS // group, Memory(DEVICE, workspace))
                 for some in scratch.cut(spans, scratch.chunks_fit(side, limit))]  # fmt: skip
        batch.run(plans, data, output)
        for plan in plans:
            taken = scratch.chunk_bytes(plan.extent, plan.kind, side)
            assert plan.memory.used <= taken <= limit
        due = [Span.of(chunk, compacting=True) for chunk in decoding(layouts, stops)]
        (due,) = scratch.cut(due, scratch.decodes_fit(side, decode_limit))
        workspace = Workspace(decode_limit, DEVICE)
        batch.compact([StepPlan.of(due, DEVICE, 0, Memory(DEVICE, workspace))])
        found.append((len(plans), output, batch.cache.nan_to_num(7.0)))
    whole, parts = found
    assert whole[0] == 1 and parts[0] > len(layouts), "a request was cut"
    assert whole[1].isfinite().all()
    # A row's place in a query tile may round its attention, but decides nothing.
    assert error(parts[1], whole[1].double().cpu()) < 1e-6
    assert torch.equal(whole[2], parts[2])


gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize(
    ("size", "group", "block_size", "dtype", "options"),
    [
        (64, 4, 16, torch.float16, {}),
        (120, 4, 16, torch.bfloat16, {}),
        (72, 2, 32, torch.float16, {}),
        (96, 3, 32, torch.bfloat16, {}),
        (256, 2, 64, torch.float16, {}),
        (128, 4, 128, torch.bfloat16, {"interval": 128}),
        (128, 8, 16, torch.float16, {"group": 128}),
        (64, 8, 16, torch.bfloat16, {"sinks": 9.0}),
        (96, 3, 16, torch.float32, {"cap": 4.0, "sinks": 6.0}),
        (128, 4, 16, torch.bfloat16, {"cap": 4.0, "sinks": 6.0}),
        (256, 2, 16, torch.bfloat16, {"cap": 4.0}),
        (256, 2, 16, torch.float32, {"cap": 4.0, "sinks": 6.0}),
    ],
)
def test_head_sizes_and_odd_lengths_equal_the_oracle(size, group, block_size, dtype, options):
    options = dict(options)
    softmax = softmax_of(options, size, 2 * group, dtype)
    layout = Layout(make_shape(640, **options))
    counts = [1, 63, 64, 65, 111, 1743, *[1] * 30]
    assert sum(counts[:6]) == 2047
    batch = tokens(sum(counts), 2, group, size, dtype)
    runner = Runner(layout, dtype, size, group=group, block_size=block_size, softmax=softmax)
    outputs = drive(runner, batch, counts)
    expected, caches = oracle(layout, batch, 2, group, softmax=softmax)
    share = kept_share(runner, batch, caches)
    print(f"slots that hold the oracle's token: {share:.4f}, error {error(outputs, expected):.2e}")
    assert share >= 0.98
    assert error(outputs, expected) < 2e-2


@gpu
@pytest.mark.parametrize("options", [{}, {"cap": 4.0, "sinks": 6.0}])
def test_overlapped_attention_equals_serial(options):
    """Attention waits for the lists that it needs; outputs and pages are the same, bit by bit."""
    layout, size, group = Layout(make_shape(512)), 128, 4
    side = torch.cuda.Stream(priority=-1)
    batch = tokens(9000, 2, group, size, torch.bfloat16)
    found = []
    for stream in (None, side):
        softmax = softmax_of(dict(options), size, 2 * group, torch.bfloat16)
        runner = Runner(layout, torch.bfloat16, size, group=group, requests=2, softmax=softmax)
        outputs = []
        for starts, stops, rows in (((0, 0), (3000, 1), 3001), ((3000, 1), (5111, 2048), 4158)):
            chunks, at = [], 0
            for r in range(2):
                chunks.append(Chunk(layout, starts[r], stops[r], at, r, SEED + r))
                at += stops[r] - starts[r]
            part = [x[:rows] for x in batch]
            output = torch.full_like(part[0], torch.nan)
            plan = StepPlan.make(chunks, group, DEVICE)
            step.run_chunks(
                plan, *part, runner.cache, runner.table, LAYER, FIRST_HEAD, runner.softmax, output,
                side=stream,
            )  # fmt: skip
            outputs.append(output)
        found.append([*outputs, runner.cache.nan_to_num(7.0)])
    assert all(output.isfinite().all() for output in found[0])
    for serial, overlapped in zip(*found, strict=True):
        assert torch.equal(serial, overlapped)


@gpu
@pytest.mark.parametrize("options", [{}, {"cap": 4.0, "sinks": 6.0}])
def test_a_graph_of_a_decode_step_replays(options):
    """store_tokens and decode_attention in one CUDA graph, replayed for other lengths."""
    layout, size, group, requests = Layout(make_shape(512)), 128, 4, 4
    heads, blocks = 2, 32
    softmax = softmax_of(dict(options), size, heads * group, torch.bfloat16)
    cache = torch.randn(requests * blocks, heads, 16, 2 * size, device=DEVICE).bfloat16()
    table = torch.randperm(requests * blocks, device=DEVICE).int().view(requests, blocks)
    query = torch.empty(requests, heads * group, size, device=DEVICE, dtype=torch.bfloat16)
    key, value = torch.empty(2, requests, heads, size, device=DEVICE, dtype=torch.bfloat16)
    live, ring = torch.zeros(2, requests, dtype=torch.int32, device=DEVICE)
    starts = torch.zeros(requests, decode.MAX_SEGMENTS, dtype=torch.int32, device=DEVICE)
    steps = torch.zeros(requests, decode.MAX_SEGMENTS, device=DEVICE)
    scratch = decode.DecodeScratch(requests, heads * group, size, 512, DEVICE)
    output = torch.empty_like(query)

    def run(pages):
        decode.store_tokens(query, key, value, pages, table, live, ring)
        decode.decode_attention(query, pages, table, live, starts, steps, softmax, scratch, output)

    def fill(counts):
        for tensor in (query, key, value):
            tensor.normal_()
        for r, count in enumerate(counts):
            segments = layout.segments(count) if count else []
            live[r] = sum(s.length for s in segments)
            ring[r] = decode.ring_word(layout.ring_start, r) if r % 2 else -1
            first, rise = decode.segment_steps(segments)
            starts[r], steps[r] = torch.from_numpy(first).to(DEVICE), torch.from_numpy(rise)
        output.fill_(torch.nan)

    fill([1, 64, 496, 0])
    run(cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(cache)
    for counts in ([1, 63, 65, 111], [2047, 496, 0, 5000]):
        fill(counts)
        expected = cache.clone()
        run(expected)
        eager = output.clone()
        output.fill_(torch.nan)
        graph.replay()
        assert output.isfinite().all()
        assert torch.equal(output, eager)
        assert torch.equal(cache, expected)


@gpu
def test_long_prefill_and_decode_equal_the_oracle():
    """bf16, real sizes; near-ties may differ by rounding and what they lead to: at most 2%."""
    layout, heads, group, size, total = Layout(make_shape(1024)), 1, 4, 128, 2600
    batch = tokens(total, heads, group, size, torch.bfloat16)
    runner = Runner(layout, torch.bfloat16, size, heads=heads, group=group)
    counts = [1500, 1000, *[1] * 100]
    outputs = drive(runner, batch, counts)
    expected, caches = oracle(layout, batch, heads, group)
    share = kept_share(runner, batch, caches)
    print(f"slots that hold the oracle's token: {share:.4f}, error {error(outputs, expected):.2e}")
    assert share >= 0.98
    assert error(outputs, expected) < 2e-2
    other = Runner(layout, torch.bfloat16, size, heads=heads, group=group)
    drive(other, batch, [2048, 452, *[1] * 100])
    assert torch.equal(runner.slots(0), other.slots(0)), "the chunking changes the cache"


@gpu
def test_teams_decide_alike():
    layout, heads, group, size, total = Layout(make_shape(1024)), 8, 4, 128, 6000
    batch = tokens(total, heads, group, size, torch.bfloat16)
    runner = Runner(layout, torch.bfloat16, size, heads=heads, group=group)
    plan = StepPlan.make([Chunk(layout, 0, total, 0, 0, SEED)], group, DEVICE)
    source = step.chunk_source(plan, *batch[1:], runner.cache, runner.table)
    scores = step.score_recent(plan, batch[0], runner.cache, source, 1, runner.softmax, group)
    model = step.Model.of(runner.cache, group)
    lists = [
        step.compact(
            plan, scores, source, heads, model, runner.zero, 0, runner.softmax, 0, Tuning(team=team)
        )[0].clone()
        for team in (1, 2, 4, 8)
    ]
    width = plan.extent.width
    for k in range(plan.extent.events):
        stored = layout.event(k).live_after - layout.shape.window
        rows = (x.view(-1, heads, width) for x in lists)
        first, *others = (x[k + 1, :, :stored] for x in rows)
        assert all(torch.equal(first, other) for other in others), f"event {k}"
