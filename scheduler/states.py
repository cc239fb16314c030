"""Cached states: what a request's cache held after some tokens, in blocks that nobody uses.

A state is a pure function of (tokens, layouts, seed): a later request with the same beginning,
layouts and seed continues from it and gets the tokens that it would have got without.  Its blocks
lie in vLLM's free queue like the blocks that vLLM caches: counted as free, the least recently used
go first.  They carry a *tag* as their block hash, so that vLLM queues them as cached blocks and
resets the tag of those that it gives to somebody else.  A state whose blocks do not all carry its
tag is gone, whatever happened to them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    KVCacheBlock,
    generate_block_hash_extra_keys,
    make_block_hash_with_group_id,
)

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from express_vllm.budget import Budget
    from express_vllm.shape import Shape

#: What a state depends on beside its tokens: shapes in ordinary and in wide layers, and the seed.
Kind = tuple["Shape", "Shape | None", int]


def kind_of(budget: Budget) -> Kind:
    """An exact budget draws no random bits, so that its seed does not matter.

    The shapes are those of the shared layouts: kinds are remembered for long, and each would keep
    its own request's shapes.
    """
    wide = budget.layout_in(True).shape if budget.wide else None
    return budget.layout.shape, wide, 0 if budget.exact else budget.seed


class Tail(NamedTuple):
    """The tokens behind the last whole block, and what vLLM hashes beside them (LoRA, images)."""

    tokens: tuple[int, ...]
    extra: Any

    @classmethod
    def of(cls, request: Request, start: int, stop: int) -> Tail:
        if start == stop:
            return cls((), None)
        extra, _ = generate_block_hash_extra_keys(request, start, stop, 0)
        return cls(tuple(request.all_token_ids[start:stop]), extra)


@dataclass(eq=False)
class State:
    """The state after `tokens` tokens: `parent` is the chained hash of their whole blocks.

    `origin` are the blocks that it is being copied from in this step, if it is.
    """

    kind: Kind
    tokens: int
    parent: BlockHash
    tail: Tail
    blocks: list[KVCacheBlock]
    tag: Any
    origin: list[KVCacheBlock] | None = None

    @property
    def whole(self) -> bool:
        return all(block.block_hash is self.tag for block in self.blocks)

    @property
    def source(self) -> list[KVCacheBlock]:
        """Where the state can be read before this step writes anything."""
        return self.origin or self.blocks


class States:
    """The states of one block pool, found by kind and tokens.

    One that is gone is dropped when its blocks belong to another, or when it is looked for: there
    are never more than blocks.
    """

    def __init__(self, block_size: int, group: int) -> None:
        self._block_size, self._group = block_size, group
        self._by_kind: dict[Kind, dict[BlockHash, list[State]]] = {}
        self._owner: dict[int, State] = {}  # by block id
        self._copied: list[State] = []
        self._numbers = itertools.count()

    def new_step(self) -> None:
        """The copies of the last step have been handed to the workers."""
        for state in self._copied:
            state.origin = None
        self._copied.clear()

    def find(self, request: Request, kind: Kind, most: int) -> State | None:
        """The longest state of at most `most` tokens that `request` continues."""
        states = self._by_kind.get(kind)
        if not states:
            return None
        hashes = request.block_hashes
        for count in range(min(most // self._block_size, len(hashes)), 0, -1):
            here = states.get(hashes[count - 1])
            for state in sorted(here or (), key=lambda s: s.tokens, reverse=True):
                if not state.whole:
                    self.drop(state)
                elif state.tokens <= most and self._continues(request, state):
                    return state
        return None

    def _continues(self, request: Request, state: State) -> bool:
        start = state.tokens // self._block_size * self._block_size
        return Tail.of(request, start, state.tokens) == state.tail

    def keep(
        self,
        request: Request,
        kind: Kind,
        tokens: int,
        blocks: Sequence[KVCacheBlock],
        origin: list[KVCacheBlock] | None = None,
    ) -> None:
        """Make `blocks`, which hold what `request` held after `tokens` tokens, a state.

        A shorter one than a block has no hash to be found by, and tokens that the scheduler does
        not know yet cannot be compared: nothing happens then.
        """
        count = tokens // self._block_size
        if not count or count > len(request.block_hashes) or tokens > request.num_tokens:
            return
        parent = request.block_hashes[count - 1]
        tail = Tail.of(request, count * self._block_size, tokens)
        tag = make_block_hash_with_group_id(
            BlockHash(b"express%d" % next(self._numbers)), self._group
        )
        state = State(kind, tokens, parent, tail, list(blocks), tag, origin)
        for other in self._by_kind.get(kind, {}).get(parent, [])[:]:
            if (other.tokens, other.tail) == (tokens, tail):
                self.drop(other)
        for block in blocks:
            if owner := self._owner.pop(block.block_id, None):
                self.drop(owner)
            block.reset_hash()
            block.set_block_hash(tag)
            self._owner[block.block_id] = state
        self._by_kind.setdefault(kind, {}).setdefault(parent, []).append(state)
        if origin:
            self._copied.append(state)

    def drop(self, state: State) -> None:
        """Forget a state; those of its blocks that are its own are blocks like any other."""
        for block in state.blocks:
            if block.block_hash is state.tag:
                block.reset_hash()
            if self._owner.get(block.block_id) is state:
                del self._owner[block.block_id]
        of_kind = self._by_kind.get(state.kind, {})
        here = of_kind.get(state.parent, [])
        if state in here:
            here.remove(state)
        if not here:
            of_kind.pop(state.parent, None)
        if not of_kind:
            self._by_kind.pop(state.kind, None)

    def __len__(self) -> int:
        """How many are known, gone ones included."""
        return len(set(self._owner.values()))
