"""`Batch`: the requests of a step, and which of them decode, are chunks, or have an event due.

It is decided here, once, for every device.  A request with one new token is a *decode*: its token
attends to slots in the pages.  One with more is a *chunk*, which may cross events.  An event is
*due* in a decode if it runs before the decode's token.  Budgets and token counts come from the
scheduler, so nothing is read back from a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from express_vllm.budget import Budget
from express_vllm.layout import Layout

from .step import current_step


@dataclass
class Chunk:
    """Tokens [start, stop) of a request: batch rows from `token` on, block-table row `row`."""

    layout: Layout
    start: int
    stop: int
    token: int = 0
    row: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """R requests in the order of vLLM's batch, as ordinary or as wide layers see them.

    Request r has batch rows [rows[r], rows[r + 1]) of new tokens, rows int [R + 1], and with them
    stops[r] tokens, stops int [R].
    """

    names: Sequence[str]
    budgets: Sequence[Budget]
    rows: np.ndarray
    stops: np.ndarray
    wide: bool = False

    @classmethod
    def of(cls, common_prefix_len: int, common: Any, wide: bool) -> Batch:
        """The current step's batch, of vLLM's CommonAttentionMetadata; without padding, and without
        requests in a dummy run.

        Raises NotImplementedError if it is not plain causal decoding and prefill, and MissingBudget
        for requests that nobody gave a budget.
        """
        _require_plain(common_prefix_len, common)
        step = current_step()
        names = step.request_ids(common)[: common.num_reqs]
        count = len(names)
        return cls(
            names, step.of(names), common.query_start_loc_cpu.numpy()[: count + 1],
            common.seq_lens_cpu_upper_bound.numpy()[:count], wide,
        )  # fmt: skip

    @cached_property
    def counts(self) -> np.ndarray:
        """New tokens, int [R]."""
        return np.diff(self.rows)

    @cached_property
    def starts(self) -> np.ndarray:
        """Tokens before the step, int [R]."""
        return self.stops - self.counts

    @cached_property
    def decodes(self) -> np.ndarray:
        """Requests with one new token, int64 [D]."""
        return np.flatnonzero(self.counts == 1)

    @cached_property
    def chunks(self) -> np.ndarray:
        """Requests with several, int64 [C]."""
        return np.flatnonzero(self.counts > 1)

    def due(self, events: np.ndarray) -> np.ndarray:
        """Which decodes have an event due, bool [D]; events int [D]: the position of the last event
        that has run once the decode's token is stored (`Layout.last_event_position`)."""
        return self.starts[self.decodes] == events

    def layout(self, r: int) -> Layout:
        return self.budgets[r].layout_in(self.wide)

    def chunk(self, r: int) -> Chunk:
        """The new tokens of request r."""
        return Chunk(
            self.layout(r), int(self.starts[r]), int(self.stops[r]), int(self.rows[r]), int(r),
            self.budgets[r].seed,
        )  # fmt: skip


def _require_plain(common_prefix_len: int, common: Any) -> None:
    found = {
        "cascade attention": common_prefix_len != 0,
        "attention that is not causal": common.causal is not True,
        "an encoder's batch": common.encoder_seq_lens is not None,
        "context parallelism": common.dcp_local_seq_lens is not None,
        "multimodal prefixes": common.mm_req_doc_ranges is not None,
        "reference sliding windows": common.rswa_prefix_lens is not None,
    }
    if names := [name for name, active in found.items() if active]:
        raise NotImplementedError(f"express runs no batch with {' and '.join(names)}")
