"""Time of one layer's prefill attention on a GPU: Express, FlashAttention 2 and 3, HyperAttention.

The heads are those of `bench.kernels`.  Without a mask all queries attend to what Express holds in
the end, the coreset and the window; its compression is in the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from express_vllm.layout import layout_for
from express_vllm.reference.attention import log_weights
from express_vllm.shape import make_shape

from ..progress import Progress
from ..run import Rows
from . import hyper
from .common import times

Batch = tuple[Tensor, Tensor, Tensor]  # [T, heads, d], [T, KV heads, d] twice
METHODS = ("express", "FA2", "FA3", "hyper")
#: Seconds that one kernel at one length may take, warm-up aside.
SECONDS = 2.0


def measure(lengths: Sequence[int], slots: int) -> Rows:
    """A row per length, method and mask: milliseconds of every repetition."""
    from ... import kernels as bench

    torch.manual_seed(0)
    rows: Rows = []
    cases = [(method, masked) for method in METHODS for masked in (True, False)]
    with Progress("time", len(lengths) * len(cases)) as progress:
        for count in lengths:
            batch = bench.random_tokens(count)
            for method, masked in cases:
                progress.say(f"{method} {count}")
                rows += _row(method, masked, count, batch, slots)
                torch.cuda.empty_cache()
                progress.step()
    return rows


def _row(method: str, masked: bool, count: int, batch: Batch, slots: int) -> Iterator[dict]:
    try:
        run = runner(method, masked, batch, slots)
        # A warm-up of a long prompt would cost as much as the measurement.
        together = 10 if count <= 8192 else 1
        found = times(run, batch[0].device, 5, SECONDS, together, warm=count <= 131072)
    except (ImportError, RuntimeError) as reason:
        print(f"no {method} at {count} tokens: {str(reason).splitlines()[0]}", flush=True)
        return
    yield {"what": "time", "method": method, "causal": masked, "tokens": count, "slots": slots,
           "ms": [round(x, 4) for x in found]}  # fmt: skip


def runner(method: str, masked: bool, batch: Batch, slots: int) -> Callable[[], object]:
    if method == "express":
        return express(batch, slots, masked)
    if method == "hyper":
        parts = [x.transpose(0, 1)[None] for x in batch]
        scale, sizes = batch[0].shape[-1] ** -0.5, hyper.Hyper.of(slots)
        return lambda: hyper.attention(parts[0], parts[1], parts[2], scale, sizes, is_causal=masked)
    return {"FA2": flash_2, "FA3": flash_3}[method](batch, masked)


def flash_2(batch: Batch, masked: bool) -> Callable[[], object]:
    query, key, value = (x.transpose(0, 1)[None] for x in batch)

    def run() -> object:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(
                query, key, value, is_causal=masked, enable_gqa=True
            )

    return run


def flash_3(batch: Batch, masked: bool) -> Callable[[], object]:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    query, key, value = batch
    count = len(query)
    ends = torch.tensor([0, count], dtype=torch.int32, device=query.device)
    return lambda: flash_attn_varlen_func(
        query, key, value, max_seqlen_q=count, cu_seqlens_q=ends, max_seqlen_k=count,
        cu_seqlens_k=ends, softmax_scale=query.shape[-1] ** -0.5, causal=masked, fa_version=3,
    )  # fmt: skip


def express(batch: Batch, slots: int, masked: bool) -> Callable[[], object]:
    from express_vllm.backend.kernels import step

    from ... import kernels as bench

    layout = layout_for(make_shape(slots))
    count = len(batch[0])
    prefill = bench.Prefill(layout, batch, count)
    if masked:
        return prefill.run
    live = layout.live(count)
    logw = log_weights(layout.segments(count), torch.float32).to(batch[0].device)

    def run() -> object:
        ((source, lists),) = prefill.compress()
        step.store_state(prefill.steps[0], batch[0], source, lists, prefill.cache, prefill.table)
        pages = prefill.cache[prefill.table[0].long()].transpose(0, 1).flatten(1, 2)[:, :live]
        size = pages.shape[-1] // 2
        return weighted(batch[0], pages[..., :size], pages[..., size:], logw, bench.SCALE)

    return run


def weighted(query: Tensor, keys: Tensor, values: Tensor, logw: Tensor, scale: float) -> Tensor:
    """softmax(scale q.k + log w) v without a mask: query [T, heads, d], keys and values
    [KV heads, S, d], logw fp32 [S] -> [heads, T, d].

    FlashAttention takes no bias, so log w comes as two more columns of the keys, the second one
    the rounding error of the first, against ones in the queries.
    """
    high = (logw / scale).to(keys.dtype)
    low = (logw / scale - high.float()).to(keys.dtype)
    extra = torch.stack([high, low], -1).expand(len(keys), -1, -1)
    ones = query.new_ones(2).expand(*query.shape[:2], 2)
    # Eight columns in all: what the kernels align to.
    wide = [pad(torch.cat([x, y], -1), (0, 6)) for x, y in ((query, ones), (keys, extra))]
    output = scaled_dot_product_attention(
        wide[0].transpose(0, 1)[None], wide[1][None], pad(values, (0, 8))[None], scale=scale,
        enable_gqa=True,
    )  # fmt: skip
    return output[0, ..., : values.shape[-1]]
