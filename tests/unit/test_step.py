"""A batch without budgets is an error, on every device: exact attention would be none of theirs."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from budgets import resolve
from vllm.v1.attention.backend import CommonAttentionMetadata

from express_vllm.backend.batch import Batch
from express_vllm.backend.chunk import Chunk
from express_vllm.backend.step import IDLE, MADE_UP, MissingBudget, Step, current_step, running
from express_vllm.backend.worker import BudgetsMixin
from express_vllm.config import ServerConfig
from express_vllm.scheduler.scheduler import STEP_BUDGETS
from express_vllm.shape import EXACT_SHAPE

BUDGET = resolve(
    {"express_memory_tokens": 128}, ServerConfig(), prompt_tokens=300, max_tokens=9,
    max_model_len=512,
)  # fmt: skip
STARTS, STOPS = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([90, 7], dtype=torch.int32)
#: Two requests, each with one token in the step.
BATCH = CommonAttentionMetadata(
    query_start_loc=STARTS, query_start_loc_cpu=STARTS, seq_lens=STOPS,
    seq_lens_cpu_upper_bound=STOPS, num_reqs=2, num_actual_tokens=2, max_query_len=1,
    max_seq_len=90, block_table_tensor=torch.zeros(2, 8, dtype=torch.int32),
    slot_mapping=torch.zeros(2, dtype=torch.int64), req_idx=np.array([0, 1]),
)  # fmt: skip


def step(budgets):
    return Step(budgets, lambda common: ["a", "b"])


def build(device, common=BATCH, prefix=0):
    builder = importlib.import_module(f"express_vllm.backend.{device}.metadata")
    owner = SimpleNamespace(block_size=16, wide=False)
    return builder.ExpressMetadataBuilder.build(owner, prefix, common)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_batch_that_nobody_announced_raises(device):
    with pytest.raises(MissingBudget, match="worker is not express's"):
        build(device)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_request_without_a_budget_raises(device):
    with running(step({"a": BUDGET})), pytest.raises(MissingBudget, match=r"\['b'\]"):
        build(device)


def test_dummy_batches_and_warm_ups_need_none():
    with running(IDLE):
        assert build("cpu").idle
    with running(step(None)):
        batch = Batch.of(0, BATCH, wide=False)
    assert [batch.layout(r).shape for r in range(2)] == [EXACT_SHAPE] * 2


def test_padding_is_no_request():
    padded = replace(
        BATCH, num_reqs=3, query_start_loc_cpu=torch.tensor([0, 1, 2, 2], dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor([90, 7, 0], dtype=torch.int32),
    )  # fmt: skip
    with running(step({"a": BUDGET, "b": BUDGET})):
        batch = Batch.of(0, padded, wide=False)
    assert batch.budgets == [BUDGET, BUDGET] and batch.stops.tolist() == [90, 7]


def test_decodes_chunks_and_events_that_are_due():
    """At every position of every request, alone and together: as the layout says."""
    first = BUDGET.layout.position(0)
    counts, starts = [1, 40, 1, 1, 2], np.array([first, 0, first + 1, 50, first])
    rows = np.cumsum([0, *counts])
    batch = Batch("abcde", [BUDGET] * 5, rows, starts + counts)
    assert batch.decodes.tolist() == [0, 2, 3] and batch.chunks.tolist() == [1, 4]
    last = [BUDGET.layout.last_event_position(n + 1) for n in starts[batch.decodes].tolist()]
    assert batch.due(np.array(last)).tolist() == [True, False, False]
    assert batch.chunk(4) == Chunk(BUDGET.layout, first, first + 2, int(rows[4]), 4, BUDGET.seed)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"causal": False}, "not causal"),
        ({"causal": torch.tensor([True, False])}, "not causal"),
        ({"encoder_seq_lens": STOPS}, "encoder"),
        ({"dcp_local_seq_lens": STOPS}, "context parallelism"),
        ({"mm_req_doc_ranges": {0: [(0, 4)]}}, "multimodal"),
        ({"rswa_prefix_lens": STOPS}, "sliding windows"),
    ],
)
def test_batches_that_are_not_plain_raise(device, changes, word):
    with running(IDLE), pytest.raises(NotImplementedError, match=word):
        build(device, replace(BATCH, **changes))


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_cascade_attention_raises(device):
    with running(IDLE), pytest.raises(NotImplementedError, match="cascade"):
        build(device, prefix=16)


class Plain:
    """vLLM's side of a worker: says which step it sees."""

    model_runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["a", "b"]))

    def execute_model(self, scheduler_output):
        return SimpleNamespace(step=current_step())

    def compile_or_warm_up_model(self):
        return current_step(), self.execute_model(SimpleNamespace()).step

    def execute_dummy_batch(self):
        self.dummy = current_step()


class Worker(BudgetsMixin, Plain):
    pass


def test_a_step_of_another_scheduler_raises():
    with pytest.raises(MissingBudget, match="scheduler is not express's"):
        Worker().execute_model(SimpleNamespace())
    output = SimpleNamespace(**{STEP_BUDGETS: {"a": BUDGET, "b": BUDGET}})
    assert Worker().execute_model(output).step.of(["a", "b"]) == [BUDGET, BUDGET]


def test_the_worker_announces_what_is_not_a_request():
    """vLLM's warm-up executes requests of its own, without a scheduler."""
    worker = Worker()
    around, inside = worker.compile_or_warm_up_model()
    assert around is IDLE and inside.of(["a", "b"]) == [MADE_UP, MADE_UP]
    worker.execute_dummy_batch()
    assert worker.dummy is IDLE
    with pytest.raises(MissingBudget):
        current_step()
