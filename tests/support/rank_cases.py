"""The Triton kernels on parts of a layer's heads, as tensor-parallel ranks run them.

In Triton's interpreter from test_tensor_parallel.py, on two GPUs from test_gpu2.py.
"""

import contextlib

import torch

from express_vllm.backend.chunk import Chunk
from express_vllm.backend.kernels import step
from express_vllm.backend.kernels.step import StepPlan
from express_vllm.layout import Layout
from express_vllm.shape import make_shape
from express_vllm.softmax import Softmax

SEED, LAYER, FIRST_HEAD = 2**33 + 5, 3, 4
GROUP, SIZE, BLOCK = 2, 64, 16


def pages(batch, heads, first_head, device, *, slots=128, events=3):
    """One layer's pages after a chunk of some events and the event of the decode after it.

    batch: q, k, v [T, KV heads, ..., d] of all heads, of which those from `heads` are taken;
    `first_head`: the global index that the kernels are told.
    """
    layout = Layout(make_shape(slots))
    count = layout.event(events).position
    query, key, value = (
        x[:count, heads].reshape(count, -1, SIZE).contiguous().to(device) for x in batch
    )
    blocks, softmax = -(-slots // BLOCK), Softmax(SIZE**-0.5)
    cache = torch.zeros(blocks, key.shape[1], BLOCK, 2 * SIZE, dtype=key.dtype, device=device)
    table = torch.arange(blocks, dtype=torch.int32, device=device).flip(0)[None].contiguous()
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    output = torch.empty_like(query)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        chunk = StepPlan.make([Chunk(layout, 0, count, seed=SEED)], GROUP, device)
        step.run_chunks(
            chunk, query, key, value, cache, table, LAYER, first_head, softmax, output
        )  # fmt: skip
        decode = StepPlan.make(
            [Chunk(layout, count, count + 1, seed=SEED)], GROUP, device, compacting=True
        )
        step.compact_pages(
            decode, cache, zero, zero + LAYER, table, first_head, softmax, GROUP
        )  # fmt: skip
    return cache.cpu()


def compare(devices, dtype, kv_heads, **options):
    """Pages of the heads, divided over `devices`, are those of all heads on one, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    query = 2 * torch.randn(1024, kv_heads, GROUP, SIZE, generator=generator)
    key, value = torch.randn(2, 1024, kv_heads, SIZE, generator=generator)
    batch = [x.to(dtype) for x in (query, 1.5 * key, value)]
    whole = pages(batch, slice(None), FIRST_HEAD, devices[0], **options)
    each = kv_heads // len(devices)
    for rank, device in enumerate(devices):
        heads = slice(rank * each, rank * each + each)
        part = pages(batch, heads, FIRST_HEAD + heads.start, device, **options)
        assert torch.equal(part, whole[:, heads]), f"rank {rank}"
        if rank:  # what the indices are for
            local = pages(batch, heads, FIRST_HEAD, device, **options)
            assert not torch.equal(local, whole[:, heads])


def test_parts_of_the_heads_decide_as_all_of_them():
    compare([torch.device("cpu")] * 2, torch.float32, 2)
