"""Compile every variant of the kernels for sm_90 without a GPU.

Usage: `python tests/support/compile_kernels.py`.  The constants come from
`backend.kernels.constants`, as in a step.  Prints CPU seconds, registers,
spilt bytes and shared memory of each.  `--only NAME`: kernels whose name holds NAME, `--models`:
all (minutes), or some as dtype:size.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from express_vllm.backend.kernels import (
    compaction,
    constants,
    decode,
    dense,
    move,
    prefill,
    scores,
    state,
)
from express_vllm.backend.kernels.constants import Model
from express_vllm.backend.kernels.events import Kind
from express_vllm.backend.kernels.launch import Launch, source
from express_vllm.shape import Shape, make_shape

#: Types of tensors by the names of arguments; the others have the model's.
TYPES = {
    torch.float32: "bias score peak total scratch shared steps part norm",
    torch.int32: "events tiles rounds ops ids table lists virtual counters progress live starts "
    "ring",
    torch.int64: "requests layer_offsets layer_ids sink_offsets",
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: Most shared memory of a program.
SHARED = 227 << 10


def shapes() -> Iterator[Shape]:
    """Cache shapes of every budget's kind."""
    for slots in (128, 160, 500, 1024, 2048, 4096, 8192, 16384, 32768):
        for profile in ("recent", "even"):
            yield make_shape(slots, profile=profile)
        yield make_shape(slots, heavy=0)
        yield make_shape(slots, schedule="paper")
    yield make_shape(2048, interval=32)
    yield make_shape(2048, group=128)
    yield make_shape(2048, group=8, interval=512)


def _model(size: int, itemsize: int, group: int, block_size: int) -> Model:
    return Model(size, group, itemsize, block_size)


def models() -> Iterator[tuple[str, Model]]:
    """Every head size and type, plain, with soft caps and with sinks."""
    for dtype, model in plain_models():
        yield dtype, model
        yield dtype, model._replace(capped=True)
        yield dtype, model._replace(sinks=True)


def plain_models() -> Iterator[tuple[str, Model]]:
    """Every head size and type; query groups of 1 to 16 and block sizes of 16 to 128."""
    others = itertools.cycle([(4, 16), (1, 64), (3, 32), (16, 128)])
    for size in (64, 96, 128, 256):
        for dtype, itemsize in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
            yield dtype, _model(size, itemsize, *next(others))
    for size in (72, 120):  # no multiples of 16
        yield "bf16", _model(size, 2, *next(others))


def variants(wanted: list[str]) -> dict[tuple, tuple[Any, str, Launch]]:
    """Distinct (kernel, dtype, launch) of all shapes and models."""
    found = {}

    def add(kernel: Any, dtype: str, launch: Launch) -> None:
        found.setdefault((kernel.__name__, dtype, launch), (kernel, dtype, launch))

    for dtype, model in models():
        if wanted != ["all"] and f"{dtype}:{model.size}" not in wanted:
            continue
        for kind in {Kind.of(shape): None for shape in shapes()}:
            for paged in (False, True):
                add(compaction.compact_kernel, dtype, constants.compaction(kind, model, paged))
        for paged in (False, True):
            add(scores.score_recent_kernel, dtype, constants.recent_scores(model, paged))
        add(prefill.prefill_kernel, dtype, constants.prefill(model))
        for kernel in (dense.gather_kernel, dense.append_kernel, state.scatter_kernel):
            add(kernel, dtype, constants.rows(model))
        add(move.move_kernel, dtype, constants.move(model))
        add(decode.decode_kernel, dtype, constants.decode(model))
        add(decode.combine_kernel, dtype, constants.decode(model)._replace(warps=1))
        add(decode.store_token_kernel, dtype, constants.rows(model)._replace(warps=1))
    add(prefill.wait_started_kernel, "bf16", Launch(warps=1))
    return found


def build(kernel: Any, dtype: str, variant: Launch) -> dict[str, Any]:
    notes = {n: kernel.fn.__annotations__.get(n, "") for n in kernel.arg_names}
    notes = {name: note for name, note in notes.items() if note != "tl.constexpr"}
    arguments = tuple(example(*x, DTYPES[dtype], kernel.fn.__globals__) for x in notes.items())
    start = cpu_seconds()
    made = triton.compile(
        source(kernel, arguments, variant.constants),
        target=GPUTarget("cuda", 90, 32), options=variant.options,
    )  # fmt: skip
    seconds = cpu_seconds() - start
    registers, stack = usage(made.asm["cubin"])
    return {
        "seconds": seconds, "shared": made.metadata.shared, "registers": registers, "stack": stack,
        "made": made,
    }  # fmt: skip


def example(name: str, note: Any, dtype: torch.dtype, names: dict[str, Any]) -> Any:
    """An argument of a kernel: a group of them, a count or an aligned tensor."""
    note = getattr(note, "__forward_arg__", note)
    if note in ("tl.int32", "tl.int64", "float"):
        return 0
    kind = names.get(note)
    if kind and issubclass(kind, tuple):
        return kind(*(example(*x, dtype, names) for x in kind.__annotations__.items()))
    found = [t for t, some in TYPES.items() if name in some.split()]
    return torch.empty(0, dtype=found[0] if found else dtype)


def cpu_seconds() -> float:
    """Of this process and what it ran: independent of what else the machine does."""
    times = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(t.ru_utime + t.ru_stime for t in times)


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack (spills) of a kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="all")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for (name, dtype, launch), variant in variants(options.models.split(",")).items():
            if options.only not in name:
                continue
            label = f"{name} {dtype} {launch.constants} warps {launch.warps}"
            try:
                made = build(*variant)
            except Exception as error:
                failed += 1
                print("FAILED", label, repr(error)[-300:], flush=True)
                continue
            too_much = made["shared"] > SHARED
            failed += too_much
            print(
                f"{made['seconds']:5.1f} s, {made['registers']:3d} registers, "
                f"{made['stack']:4d} B spilt, {made['shared'] >> 10:3d} KiB shared: {label}",
                "TOO MUCH SHARED MEMORY" if too_much else "",
                flush=True,
            )  # fmt: skip
    raise SystemExit(f"{failed} variants failed" if failed else 0)


if __name__ == "__main__":
    main()
