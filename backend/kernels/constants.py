"""Which variant of a kernel serves: its constants, from the kind of a cache shape and the model.

Triton compiles a kernel for each set of constants.  Nothing here depends on a batch, and a budget's
size is no constant, so a server compiles everything when it starts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from express_vllm.softmax import Softmax

from .events import TILE_POINTS, Kind
from .launch import Launch

#: Halving kernels.
GAUSSIAN, EXPONENTIAL = 0, 1

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
#: Slots that one program of a decode reads, or a multiple: no request has more than MAX_SPLITS
#: splits, since the grid that a CUDA graph captures holds that many programs for every request.
SPLIT = 512
MAX_SPLITS = 16
#: Most segments of a layout: levels, drawn entry, exact parts (a weight of 2^60 is out of reach).
MAX_SEGMENTS = 32
#: Shared memory of a multiprocessor that a program may use.
_SHARED = 224 << 10


class Model(NamedTuple):
    """What kernels must know of a model and its pages."""

    size: int  # of a head
    group: int  # query heads of a KV head
    itemsize: int
    block_size: int
    capped: bool = False  # whether logits have a soft cap
    sinks: bool = False  # whether query heads have sinks

    @property
    def padded(self) -> int:
        return 1 << (self.size - 1).bit_length()

    @classmethod
    def of(cls, kv_cache: Tensor, group: int, softmax: Softmax | None = None) -> Model:
        """kv_cache [blocks, KV heads, block size, 2 d]; `softmax`: for kernels that attend."""
        model = cls(kv_cache.shape[3] // 2, group, kv_cache.element_size(), kv_cache.shape[2])
        return model.attending(softmax) if softmax else model

    def attending(self, softmax: Softmax) -> Model:
        return self._replace(capped=bool(softmax.cap), sinks=softmax.sinks is not None)


class Rows(NamedTuple):
    """Of kernels that move rows."""

    size: int  # of a head
    padded: int  # to a power of two, as everywhere below
    group: int  # query heads of a KV head
    block: int  # rows at a time
    block_size: int  # slots of a page


class Move(NamedTuple):
    row: int  # elements of a key and its value
    columns: int  # that a unit of work moves
    block: int
    block_size: int


class Scoring(NamedTuple):
    """Of `score_recent_kernel`."""

    size: int
    padded: int
    group: int
    block: int  # slots at a time
    block_size: int  # slots of a source's page; 0: not paged
    ring_block: int  # slots of a page
    has_new: bool  # whether query rows may be the step's own
    capped: bool
    sinks: bool


class Compaction(NamedTuple):
    """Of `compact_kernel`."""

    size: int
    padded: int
    candidates: int  # that are in registers at a time
    share: int  # candidates that a member weighs at a time
    slices: int  # parts of the stored slots: they order a sum
    block: int  # slots of a tile of scores
    halvings: int  # of a round that a program runs side by side
    together: int  # how many of these share a matrix product
    pairs: int  # of a tile
    block_size: int  # slots of a source's page; 0: not paged
    heavy: bool  # whether there are heavy hitters
    kind: int  # of the halving kernel
    long: bool  # groups of any number of tiles, one at a time
    wide: int  # entries that a program copies at a time
    capped: bool


class Attention(NamedTuple):
    """Of `prefill_kernel`."""

    group: int
    size: int
    padded: int
    rows: int  # of a query tile
    block: int  # slots at a time
    capped: bool
    sinks: bool


class Decode(NamedTuple):
    """Of `decode_kernel` and `combine_kernel`."""

    group: int
    rows: int  # of the matrix products
    size: int
    padded: int
    block: int  # slots at a time
    split: int  # least slots of a split
    segments: int
    block_size: int
    capped: bool
    sinks: bool


@lru_cache
def compaction(kind: Kind, model: Model, paged: bool) -> Launch:
    """Without pages a team runs a round, one halving a program; with pages there are as many
    layers, requests and heads as programs, and each runs the halvings of a round by itself."""
    padded = model.padded
    halvings = side_by_side(kind, paged)
    together = max(1, min(halvings, 2, _OPERAND // (TILE_POINTS * padded * model.itemsize)))
    return Launch(
        Compaction(
            size=model.size,
            padded=padded,
            candidates=CANDIDATES,
            share=CANDIDATES if paged else CANDIDATES // SLICES,
            slices=SLICES,
            block=_scored(model),
            halvings=halvings,
            together=together,
            pairs=TILE_POINTS // 2,
            block_size=model.block_size if paged else 0,
            heavy=kind.heavy,
            kind=EXPONENTIAL if kind.kernel == "exponential" else GAUSSIAN,
            long=kind.long,
            wide=_WIDE,
            capped=model.capped and kind.heavy,
        ),
        warps=8,
    )


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
        Scoring(
            model.size, model.padded, model.group, _scored(model), model.block_size if paged else 0,
            model.block_size, not paged, model.capped, model.sinks,
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
    constants = Attention(
        model.group, model.size, model.padded, rows, block, model.capped, model.sinks
    )
    return Launch(constants, 8, stages, registers)


@lru_cache
def rows(model: Model) -> Launch:
    return Launch(Rows(model.size, model.padded, model.group, MOVED, model.block_size))


@lru_cache
def move(model: Model) -> Launch:
    return Launch(Move(2 * model.size, MOVE_COLUMNS, 64, model.block_size))


@lru_cache
def decode(model: Model, block: int = 0, warps: int = 0) -> Launch:
    """`block`, `warps`: other than the usual ones."""
    constants = Decode(
        model.group, max(16, 1 << (model.group - 1).bit_length()), model.size, model.padded,
        block or (128 if model.padded <= 128 else 64), SPLIT, MAX_SEGMENTS, model.block_size,
        model.capped, model.sinks,
    )  # fmt: skip
    return Launch(constants, warps or 4)
