"""The end-to-end benchmark: requests that fit, steps along the way, the table, collectives."""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys

import pytest

from bench import engine, record, traces

OPTIONS = argparse.Namespace(memory=2048, outputs=[8192], window=128, whole=False, max_num_seqs=256,
                            batched_tokens=8192, wide_layers=[], shape="8b")  # fmt: skip


class Steps:
    """A step takes 5 ms and 1 ms for every 1,000 tokens of a request, which a budget bounds."""

    def __init__(self, most):
        self.most = most

    def slots(self):
        return 450_000

    def decode(self, requests, length, window, most):
        return window * (5e-3 + 1e-6 * min(length, self.most)), window * requests


def test_tokens_per_second_are_those_of_the_mean_step_along_the_way():
    exact = engine.long_form(Steps(1 << 30), "FLASH_ATTN", OPTIONS)
    requests = exact["requests, 8192 tokens of output"]
    assert requests == 450_000 // (1024 + 8192)
    # From 1,024 to 9,216 tokens: 10.12 ms in the mean; the last part is taken as flat.
    assert exact["tokens/s, 8192 tokens of output"] == pytest.approx(requests / 10.12e-3, rel=2e-3)
    ours = engine.long_form(Steps(2048), "express", OPTIONS)
    assert ours["requests, 8192 tokens of output"] == 450_000 // 2048
    assert ours["tokens/s, 8192 tokens of output"] == pytest.approx(219 / 6.98e-3, rel=6e-3)


def test_every_request_fits_to_the_end_of_the_last_window():
    """Those whose prompts are read first gain a token in every step that reads the others'."""
    for requests in (1, 48, 110, 256):
        last = engine.measured_lengths("FLASH_ATTN", 8192, requests, OPTIONS)[-1]
        reading = -(-requests * last // OPTIONS.batched_tokens)
        assert last + reading + 8 + OPTIONS.window <= engine.PROMPT + 8192 + 1


def test_with_wide_layers_the_step_is_timed_until_they_are_full():
    options = argparse.Namespace(**vars(OPTIONS) | {"wide_layers": [8, 16]})
    assert engine.measured_lengths("express", 16384, 8, OPTIONS) == [1024, 2560, 4096]
    assert engine.ordinary_slots(OPTIONS) == 2048
    assert engine.ordinary_slots(options) == 1724, "two of 32 layers have four times as many"
    assert engine.measured_lengths("express", 16384, 8, options) == [1024, 2155, 3448, 8620]
    assert engine.measured_lengths("express", 8192, 8, options)[-1] > 4 * 1724


def test_the_table_has_a_line_for_every_figure_of_either_backend():
    rows = [{"backend": "FLASH_ATTN", "a, s": 4.0, "step of 49, ms": 9.2},
            {"backend": "express", "a, s": 1.0, "step of 219, ms": 19.1}]  # fmt: skip
    lines = record.table(engine.transposed(rows)).splitlines()
    assert lines[0] == "| figure | FLASH_ATTN | express | second / first |"
    assert lines[2:] == ["| a, s | 4.0 | 1.0 | 0.25 |", "| step of 49, ms | 9.2 |  |  |",
                         "| step of 219, ms |  | 19.1 |  |"]  # fmt: skip


def write_trace(path, steps, *, late=0.0):
    """A rank's trace: `steps` hold the microseconds of each step's collectives."""
    events = [{"name": "run", "cat": "user_annotation", "ts": 0.0, "dur": 1e6}]
    number = 0
    for i, durations in enumerate(steps):
        begin = 1000.0 * (i + 1)
        events.append(
            {"name": "execute_32_context_0", "cat": "user_annotation", "ts": begin, "dur": 100.0}
        )
        for name, duration in [
            ("gemm", 50.0),
            *(("ncclDevKernel_AllReduce", d) for d in durations),
        ]:
            number += 1
            launch = {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": begin + 10}
            kernel = {"cat": "kernel", "name": name, "ts": begin + 1500 + late, "dur": duration}
            for event in (launch, kernel):
                events.append(event | {"args": {"correlation": number}})
    before = {"cat": "kernel", "name": "ncclDevKernel_AllReduce", "ts": 900.0, "dur": 7.0}
    events.append(before | {"args": {"correlation": 10**6}})  # launched before the trace began
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)


def test_collectives_belong_to_the_step_that_launched_them(tmp_path):
    """Kernels run a step later than they are launched; steps may be empty, the last one is cut."""
    write_trace(tmp_path / "decode_rank0.1.pt.trace.json.gz", [[10, 20], [], [], [], [30, 40], [5]])
    write_trace(tmp_path / "decode_rank1.1.pt.trace.json.gz", [[1, 1], [1, 1], [1]], late=1e4)
    count, seconds = traces.collectives(tmp_path, "decode")
    assert count == 2
    assert seconds == pytest.approx(2e-6), "of the rank that waits least"


def test_ranks_that_differ_are_an_error(tmp_path):
    write_trace(tmp_path / "decode_rank0.1.pt.trace.json.gz", [[10, 20]])
    write_trace(tmp_path / "decode_rank1.1.pt.trace.json.gz", [[10]])
    with pytest.raises(ValueError, match=r"differ .*\[1, 2\]"):
        traces.collectives(tmp_path, "decode")
    with pytest.raises(FileNotFoundError, match="no trace prefill"):
        traces.collectives(tmp_path, "prefill")


def test_benchmarks_run_from_the_root_whatever_is_installed():
    """There the folder express_vllm hides an installed copy, and has no backend."""
    script = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in str(f)]\n"
        "import bench, express_vllm.backend, express_vllm.scheduler as s; print(s.__file__)"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=record.ROOT, capture_output=True,
                         text=True)  # fmt: skip
    assert run.stdout.strip() == str(record.ROOT / "scheduler" / "__init__.py"), run.stderr
