"""The block manager: a request gets the blocks of its layout, never more than its budget.

Blocks only ever append while a request runs.  One that starts from a cached state gets a copy of
its blocks, or, when the pool has no room for both, the blocks themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request

from express_vllm.budget import Budget

from .states import State, States, kind_of

#: Blocks that a step copies at most, if it copies for more than one request.
MOST_COPIES = 2048


@dataclass
class Hit:
    """A request starts after `tokens` tokens with a copy of `source`, or with `taken`'s blocks."""

    tokens: int
    source: list[KVCacheBlock]
    taken: State | None = None


class ExpressManager(SingleTypeKVCacheManager):
    """Clamps vLLM's token counts to `Budget.reserved`.

    The scheduler puts every request's budget into `budgets` before its first allocation.
    `shares` says whether exact requests share blocks as in vLLM; wide layers fill a block's larger
    page first, so that there a block is not a range of positions.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.budgets: dict[str, Budget] = {}
        self.states = States(self.block_size, self.kv_cache_group_id)
        self.shares = False
        self._hits: dict[str, Hit] = {}
        #: Ids of the blocks that this step fills and vLLM takes for cached.
        self._filling: set[int] = set()
        #: The request that was last looked for, if it will find more in the next step.
        self.soon = ""

    def new_step_starts(self) -> None:
        super().new_step_starts()
        self._filling.clear()

    def shared(self, request_id: str) -> bool:
        """Whether the request's blocks are positions that others may read."""
        return self.shares and self.budgets[request_id].exact

    # What a request starts from

    def find(self, request: Request) -> Hit | None:
        """The longest beginning of a request that is cached; it counts for the next allocation."""
        name, most = request.request_id, request.num_tokens - 1
        budget, self.soon = self.budgets[name], ""
        if self.shared(name):
            return self._find_exact(request, budget, most)
        state = self.states.find(request, kind_of(budget), most)
        hit = Hit(state.tokens, state.source) if state else None
        if state and not self._room_for_copy(request, budget, state.source):
            hit = Hit(state.tokens, state.blocks, state) if _unused(state.blocks) else None
        exact = self._find_exact(request, budget, most)
        if exact and (hit is None or exact.tokens > hit.tokens):
            hit = exact
        self._hits.pop(name, None)
        if hit:
            self._hits[name] = hit
        return hit

    def _room_for_copy(
        self, request: Request, budget: Budget, source: Sequence[KVCacheBlock]
    ) -> bool:
        """Whether the pool can hold the request's prompt beside what it is copied from."""
        needed = cdiv(budget.reserved(request.num_tokens), self.block_size)
        held = self._get_num_evictable_blocks(source)
        return self.block_pool.get_num_free_blocks() >= needed + held

    def _find_exact(self, request: Request, budget: Budget, most: int) -> Hit | None:
        """Blocks of exact requests.  A bounded one, which takes copies, looks the same until its
        ring comes into use."""
        if not self.shares:
            return None
        blocks = self._written(request, min(most, budget.layout.plain_until))
        fits = blocks and (budget.exact or self._room_for_copy(request, budget, blocks))
        return Hit(len(blocks) * self.block_size, blocks) if fits else None

    def _written(self, request: Request, most: int) -> list[KVCacheBlock]:
        """The longest run of leading blocks that exact requests have filled in earlier steps.

        vLLM takes blocks for cached when a step is scheduled that will fill them.  That is too soon
        for a copy, and for chunks, which read what is in the pages before any of them writes.
        """
        (blocks,), _ = self.find_longest_cache_hit(
            request.block_hashes, most, [self.kv_cache_group_id], self.block_pool
        )
        filling = (i for i, block in enumerate(blocks) if block.block_id in self._filling)
        count = next(filling, len(blocks))
        if count < len(blocks):
            self.soon = request.request_id
        return blocks[:count]

    @property
    def copies_full(self) -> bool:
        """Whether a further request's copy should wait for the next step."""
        return len(self._pending_cow_copies) >= MOST_COPIES

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        hit = self._hits.pop(request_id, None)
        if hit is None or not new_computed_blocks:
            super().add_local_computed_blocks(
                request_id, new_computed_blocks, num_local_computed_tokens,
                num_external_computed_tokens,
            )  # fmt: skip
            return
        mine = hit.source
        if hit.taken:
            self.states.drop(hit.taken)
        else:
            mine = self._copies_of(hit.source)
        self.block_pool.touch(mine)
        self.req_to_blocks[request_id].extend(mine)
        self.num_cached_block[request_id] = 0

    def _copies_of(self, source: Sequence[KVCacheBlock]) -> list[KVCacheBlock]:
        """New blocks that the step's workers fill from `source`.  Both ends are held until that
        has been handed to them; then vLLM lets go of them."""
        self.block_pool.touch(source)
        copies = self.block_pool.get_new_blocks(len(source))
        self._pending_cow_copies.extend(zip(source, copies, strict=True))
        return copies

    # What a request leaves behind

    def keep(self, request: Request) -> None:
        """The blocks of a request that is about to be freed become a state."""
        name, tokens = request.request_id, request.num_computed_tokens
        self._hits.pop(name, None)
        if not self.enable_caching or name not in self.budgets or self.shared(name):
            return
        budget = self.budgets[name]
        count = cdiv(budget.reserved(tokens), self.block_size)
        blocks = self.req_to_blocks.get(name, [])[:count]
        if blocks and len(blocks) == count:
            self.states.keep(request, kind_of(budget), tokens, blocks)

    def snapshot(self, request: Request, spare: int) -> None:
        """Copy a running request's blocks to a state, if more than `spare` blocks stay free."""
        budget, tokens = self.budgets[request.request_id], request.num_computed_tokens
        count = cdiv(budget.reserved(tokens), self.block_size)
        if self.block_pool.get_num_free_blocks() < 2 * count + spare or self.copies_full:
            return
        blocks = self.req_to_blocks[request.request_id][:count]
        copies = self._copies_of(blocks)
        self.states.keep(request, kind_of(budget), tokens, copies, origin=blocks)

    # Blocks of the layout

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        slots = self.budgets[request_id].reserved(num_tokens)
        hit = self._hits.get(request_id) if new_computed_blocks else None
        if hit:
            new = cdiv(slots, self.block_size) - (len(hit.source) if hit.taken else 0)
            return new + self._get_num_evictable_blocks(hit.source)
        return super().get_num_blocks_to_allocate(
            request_id, slots, new_computed_blocks, min(total_computed_tokens, slots),
            num_local_computed_tokens, num_tokens_main_model, apply_admission_cap, prefill_end,
        )  # fmt: skip

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        slots = self.budgets[request_id].reserved(num_tokens)
        return super().allocate_new_blocks(request_id, slots, num_tokens_main_model)

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        name = request.request_id
        if not self.shared(name):
            return
        before = self.num_cached_block.get(name, 0)
        super().cache_blocks(request, num_tokens, *args, **kwargs)
        filled = self.req_to_blocks[name][before : self.num_cached_block.get(name, 0)]
        self._filling.update(block.block_id for block in filled)

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], block_pool: Any,
        *args: Any, **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:  # fmt: skip
        """As in vLLM's full attention, block by block; only exact requests cache blocks so."""
        blocks: list[KVCacheBlock] = []
        size = block_pool.hash_block_size
        for value in block_hashes[: max_length // size]:
            cached = block_pool.get_cached_block(value, kv_cache_group_ids)
            if not cached:
                break
            blocks.extend(cached)
        return (blocks,), len(blocks) * size

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        return 0

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        return 0


def _unused(blocks: Sequence[KVCacheBlock]) -> bool:
    return all(block.ref_cnt == 0 for block in blocks)
