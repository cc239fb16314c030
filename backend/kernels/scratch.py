"""Bytes of scratch that plans take, and plans cut to what was reserved for them.

Three kinds of launches take scratch: a chunk's (a dense copy of old slots and new tokens, scores,
lists), compaction of decodes on the pages of some layers at a time, and moving their rows.  The
first is bounded by cutting a step into plans, requests first; a request that alone asks for too
much is cut by tokens: [a, m), then [m, b) leaves the state that [a, b) leaves.  The others work
through layers, and with as many programs as there is room for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from express_vllm.shape import RING_ROWS, Shape, least_interval

from . import constants, tables
from .constants import SLICES, Model
from .events import ROUND_HALVINGS, TILE_POINTS, Kind, round_width
from .memory import aligned
from .span import Extent, Span, cdiv

#: Least bytes of a workspace: plans of usual budgets are not cut.
LEAST = 256 << 20
#: Bytes of scores and lists for some layers, and of rows that are being moved: more is no faster.
_SCORES, _SPARE = 96 << 20, 64 << 20
#: Between tensors: what aligning them may take, more than a launch has of them.
_SLACK = 16 * aligned(1)
#: Tokens of a chunk of the largest budget that are not cut.
_PIECE = 8192


@dataclass(frozen=True)
class Tuning:
    """Launch shapes of the compaction kernels."""

    team: int = 0  # programs that share one layer, request and KV head; 0: as `programs` allow
    programs: int = 264  # persistent programs of one launch: more work waits for its turn
    warps: int = 8


USUAL = Tuning()


class Side(NamedTuple):
    """The model's side of a plan's size; `heads` are KV heads."""

    model: Model
    heads: int
    device: torch.device


class Sharing(NamedTuple):
    """How a compaction is shared out, and 32-bit words of each program's or team's scratch."""

    tasks: int  # layers, requests, heads
    team: int
    teams: int
    scratch: int  # of a program
    virtual: int  # of a program, twice
    outputs: int  # of a team, twice
    shared: int  # of a team, all
    counters: int

    @property
    def programs(self) -> int:
        return self.team * self.teams

    @property
    def nbytes(self) -> int:
        words = (
            self.programs * 2 * self.virtual, self.programs * self.scratch,
            self.teams * self.shared, self.counters,
        )  # fmt: skip
        return sum(aligned(4 * n) for n in words)


def sharing(
    extent: Extent, kind: Kind, side: Side, layers: int, paged: bool, tuning: Tuning = USUAL,
    limit: int | None = None,
) -> Sharing:  # fmt: skip
    """Of a compaction of `layers`; at most `limit` bytes, but at least one team."""
    tasks = layers * extent.requests * side.heads
    team = 1 if paged else team_size(tasks, extent.round, tuning, side.device)
    teams = min(tasks, tuning.programs // team)
    pairs = TILE_POINTS // 2
    signs = cdiv(extent.longest, 2 * pairs) * pairs
    masses = cdiv(extent.candidates, constants.CANDIDATES) * constants.CANDIDATES
    halvings = constants.side_by_side(kind, paged)
    scratch, virtual, outputs = (
        cdiv(n, 64) * 64
        for n in (
            halvings * pairs * (pairs + 2) + side.model.padded + signs, extent.base, extent.outputs,
        )
    )  # fmt: skip
    shared = 4 * RING_ROWS * SLICES + 2 * outputs + masses
    if limit is not None:
        words = limit // 4 - teams - extent.requests * side.heads  # less the counters
        teams = max(1, min(teams, words // (team * (2 * virtual + scratch) + shared)))
    before = cdiv(1 + teams, 4) * 4  # pointers keep their alignment
    counters = before + extent.requests * side.heads
    return Sharing(tasks, team, teams, scratch, virtual, outputs, shared, counters)


def team_size(tasks: int, width: int, tuning: Tuning, device: torch.device) -> int:
    """Programs of a team.  All programs of a launch must be on the device together, since members
    wait for each other; a round has `width` halvings to share out."""
    if device.type != "cuda":  # the interpreter runs one program after the other
        return 1
    if tuning.team:
        return tuning.team
    team = 1
    while team < min(width, SLICES) and 2 * team * tasks <= tuning.programs // 4:
        team *= 2
    return team


def dense_bytes(extent: Extent, side: Side) -> int:
    return aligned(extent.dense * side.heads * 2 * side.model.size * side.model.itemsize)


def layer_bytes(extent: Extent, side: Side) -> int:
    """Of one layer's scores, query rows and lists."""
    a_row = side.model.itemsize * side.model.size + 8
    scored = RING_ROWS * (4 * extent.scored + a_row * extent.instances)
    return side.heads * (scored + 4 * extent.lists)


def chunk_bytes(extent: Extent, kind: Kind | None, side: Side) -> int:
    """Of one layer of a plan with new tokens; the copy counts even where it turns out needless."""
    total = dense_bytes(extent, side)
    if kind:
        # One alignment for each of scores, rows, maxima with sums, and lists.
        total += layer_bytes(extent, side) + 4 * aligned(1)
        total += sharing(extent, kind, side, 1, False).nbytes
    return total


class Compaction(NamedTuple):
    """How much of a compaction on pages runs at a time."""

    layers: int
    sharing_limit: int | None
    spare: int  # bytes of rows that are being moved

    @classmethod
    def of(cls, extent: Extent, side: Side, limit: int | None) -> Compaction:
        """Within `limit` bytes: half of them for scores and lists, a quarter each for the rest."""
        scores = _SCORES if limit is None else min(_SCORES, limit // 2)
        # Even, so that pointers keep their alignment.
        layers = max(2, scores // layer_bytes(extent, side) // 2 * 2)
        if limit is None:
            return cls(layers, None, _SPARE)
        return cls(layers, limit // 4 - _SLACK, min(_SPARE, limit // 4))


def spare_bytes(extent: Extent, side: Side) -> int:
    """Of the rows that one program moves."""
    return extent.final * constants.MOVE_COLUMNS * side.model.itemsize


def compaction_fits(extent: Extent, kind: Kind, side: Side, limit: int) -> bool:
    """Whether two layers, one program and one program's rows have room in `limit` bytes."""
    one = sharing(extent, kind, side, 1, True, limit=0)
    return (
        2 * layer_bytes(extent, side) <= limit // 2
        and one.nbytes <= limit // 4 - _SLACK
        and spare_bytes(extent, side) <= limit // 4
    )


def chunks_fit(side: Side, limit: int) -> Callable[[Extent, Kind | None], bool]:
    return lambda extent, kind: chunk_bytes(extent, kind, side) <= limit


def decodes_fit(side: Side, limit: int) -> Callable[[Extent, Kind | None], bool]:
    return lambda extent, kind: kind is None or compaction_fits(extent, kind, side, limit)


def cut(spans: Iterable[Span], fits: Callable[[Extent, Kind | None], bool]) -> list[list[Span]]:
    """Lists of spans that fit, each of one kind of events, to be run in this order."""
    found: list[list[Span]] = []
    for kind, some in _by_kind(spans):
        extent = None
        for span in some:
            pieces = list(_pieces(span, fits))
            for piece in pieces:
                both = piece.extent if extent is None else extent + piece.extent
                # Pieces of a request need the state that the one before them leaves.
                if extent is None or len(pieces) > 1 or not fits(both, kind):
                    found.append([])
                    both = piece.extent
                found[-1].append(piece)
                extent = both
            if len(pieces) > 1:
                extent = None
    return found


def _by_kind(spans: Iterable[Span]) -> list[tuple[Kind | None, list[Span]]]:
    """Spans by the kind of their events, long ones first; those without go with any."""
    kinds: dict[Kind | None, list[Span]] = {}
    for span in sorted(spans, key=lambda s: -len(s.events)):
        kind = span.kind if span.events else next(iter(kinds), None)
        kinds.setdefault(kind, []).append(span)
    return list(kinds.items())


def _pieces(span: Span, fits: Callable[[Extent, Kind | None], bool]) -> Iterator[Span]:
    """Halve a chunk until its parts fit, or are one token."""
    chunk = span.chunk
    count = span.stop - chunk.start
    if count < 2 or fits(span.extent, span.kind if span.events else None):
        yield span
        return
    middle = chunk.start + count // 2
    yield from _pieces(Span.of(replace(chunk, stop=middle)), fits)
    yield from _pieces(Span.of(replace(chunk, start=middle, token=chunk.token + count // 2)), fits)


def workspace_bytes(slots: int, tokens: int, shape: Shape | None, side: Side) -> int:
    """Bytes with which any request of up to `slots` live slots can run, one token at a time, and
    the largest one some thousand tokens at a time.

    tokens: of a step; shape: of the largest budget, None if none has events.
    """
    kinds = [Kind(heavy, True, "exponential") for heavy in (False, True)]
    one = _largest(slots, 1, 1, slots, ROUND_HALVINGS)
    needs = [LEAST, *(chunk_bytes(one, kind, side) for kind in kinds)]
    program = max(sharing(one, kind, side, 1, True, limit=0).nbytes for kind in kinds)
    needs += [
        4 * layer_bytes(one, side),
        4 * (program + _SLACK),
        4 * spare_bytes(one, side),
    ]
    piece = min(tokens, _PIECE)
    if shape:
        several = _largest(
            slots, piece, cdiv(piece, shape.interval) + 1, shape.heavy + shape.interval,
            round_width(shape),
        )  # fmt: skip
        needs.append(chunk_bytes(several, Kind.of(shape), side))
    return aligned(max(needs))


def _largest(slots: int, tokens: int, events: int, candidates: int, width: int) -> Extent:
    """Of a request: its first event may choose among all slots, the others among `candidates`."""
    scored = slots + 16 + (events - 1) * (candidates + 16)
    return Extent(
        1, events, slots + tokens, scored, (events + 1) * slots, 0, slots, tokens, slots, events,
        slots, slots + 16, slots, 2 * slots, slots, width,
    )  # fmt: skip


def table_bytes(slots: int, tokens: int, shape: Shape | None) -> int:
    """Of the tables of a step with `tokens` tokens, for layers whose largest budget has `shape`: at
    most an id and a log2 weight for each live slot of each event.  A request that pins tokens has
    more events than `shape`."""
    events = cdiv(tokens, least_interval(shape)) + 1 if shape else 1
    return 12 * slots * events + tables.TILE.itemsize * tokens
