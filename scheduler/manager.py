"""The block manager: a request gets the blocks of its layout, never more than its budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

from express_vllm.budget import Budget


class ExpressManager(SingleTypeKVCacheManager):
    """Clamps vLLM's token counts to `Budget.reserved`; blocks only ever append while it runs.

    The scheduler puts every request's budget into `budgets` before its first allocation.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.budgets: dict[str, Budget] = {}

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
        return super().get_num_blocks_to_allocate(
            request_id, slots, new_computed_blocks, min(total_computed_tokens, slots),
            num_local_computed_tokens, num_tokens_main_model, apply_admission_cap, prefill_end,
        )  # fmt: skip

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        slots = self.budgets[request_id].reserved(num_tokens)
        return super().allocate_new_blocks(request_id, slots, num_tokens_main_model)

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:  # fmt: skip
        return tuple([] for _ in kv_cache_group_ids), 0

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        return 0

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        return 0
