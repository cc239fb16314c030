"""Which variant of a kernel serves: its constants, from the kind of a cache shape and the model.

Triton compiles a kernel for each set of constants.  Nothing here depends on a batch, and a budget's
size is no constant, so a server compiles everything when it starts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from .events import TILE_POINTS, Kind
from .halving import EXPONENTIAL, GAUSSIAN

#: Rows of a query tile: tokens times query heads of a KV head.
QUERY_ROWS = 128
#: Slices of an event's stored slots; a team has at most as many members.
SLICES = 8
#: Most halvings of a round that one program runs side by side: a warp each.
HALVINGS = 8
#: Candidates for heavy hitters that are in registers at a time.
CANDIDATES = 512
#: Entries that a program copies at a time.
_WIDE = 2048
#: Bytes of the keys that one batch of pair differences reads.
_OPERAND = 32 << 10
#: Slots of the small kernels' tiles.
MOVED = 32
#: Bytes of a row that one unit of a move handles: small enough that its rows stay in L2.
MOVE_COLUMNS = 64
#: Shared memory of a multiprocessor that a program may use.
_SHARED = 224 << 10


class Model(NamedTuple):
    """What kernels must know of a model and its pages."""

    size: int  # of a head
    group: int  # query heads of a KV head
    itemsize: int
    block_size: int

    @property
    def padded(self) -> int:
        return 1 << (self.size - 1).bit_length()


class Launch(NamedTuple):
    """Constants of a kernel, in the order of its parameters, and how it is launched."""

    constants: tuple
    warps: int = 4
    stages: int = 3
    registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        return self._asdict()


@lru_cache
def compaction(kind: Kind, model: Model, paged: bool) -> Launch:
    """Without pages a team runs a round, one halving a program; with pages there are as many
    layers, requests and heads as programs, and each runs the halvings of a round by itself."""
    padded = model.padded
    halvings = side_by_side(kind, paged)
    together = max(1, min(halvings, 2, _OPERAND // (TILE_POINTS * padded * model.itemsize)))
    return Launch(
        (
            model.size, padded, CANDIDATES, CANDIDATES if paged else CANDIDATES // SLICES,
            SLICES, _scored(model), halvings,
            together, TILE_POINTS // 2, model.block_size if paged else 0, kind.heavy,
            EXPONENTIAL if kind.kernel == "exponential" else GAUSSIAN, kind.long, _WIDE,
        ),
        warps=8,
    )  # fmt: skip


def side_by_side(kind: Kind, paged: bool) -> int:
    """Halvings of a round that a program runs at a time."""
    return HALVINGS if paged and not kind.long else 1


def _scored(model: Model) -> int:
    """Slots of a tile of scores.  Of 128 slots two of a team's eight members would have twice the
    others' work (measured on an H100: 24.1 us an event at 2,048 slots, not 23.0)."""
    return 64 if model.itemsize == 2 or model.padded <= 64 else 32


@lru_cache
def recent_scores(model: Model, paged: bool) -> Launch:
    return Launch(
        (
            model.size, model.padded, model.group, _scored(model), model.block_size if paged else 0,
            model.block_size, not paged,
        ),
        stages=2,
    )  # fmt: skip


@lru_cache
def prefill(model: Model) -> Launch:
    """The largest tile whose operands fit; 32 slots and 128 registers let two programs share a
    multiprocessor where 128 rows of 128 elements do (measured on an H100: 375 TFLOP/s, not 286)."""
    rows = QUERY_ROWS
    for block, stages in ((64, 3), (64, 2), (32, 2), (16, 2)):
        if (rows + 2 * stages * block) * model.padded * model.itemsize <= _SHARED:
            break
    else:
        raise ValueError(f"a head size of {model.size} does not fit attention's query tile")
    registers = None
    if model.padded == 128 and model.itemsize == 2:
        block, stages, registers = 32, 3, 128
    elif model.padded == 128:  # each fp32 operand is there in two parts
        block, stages = 16, 2
    constants = (model.group, model.size, model.padded, rows, block)
    return Launch(constants, 8, stages, registers)


@lru_cache
def gather(model: Model) -> Launch:
    return Launch((model.size, model.padded, MOVED, model.block_size))


@lru_cache
def append(model: Model) -> Launch:
    return Launch((model.size, model.padded, MOVED))


@lru_cache
def scatter(model: Model) -> Launch:
    return Launch((model.size, model.padded, model.group, MOVED, model.block_size))


@lru_cache
def move(model: Model) -> Launch:
    return Launch((2 * model.size, MOVE_COLUMNS, 64, model.block_size))
