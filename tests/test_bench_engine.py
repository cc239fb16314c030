"""The end-to-end benchmark's arithmetic: requests that fit, steps along the way, the table."""

from __future__ import annotations

import argparse

import pytest

from bench import engine, record

OPTIONS = argparse.Namespace(memory=2048, outputs=[8192], window=128, whole=False)


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


def test_the_table_has_a_line_for_every_figure_of_either_backend():
    rows = [{"backend": "FLASH_ATTN", "a, s": 4.0, "step of 49, ms": 9.2},
            {"backend": "express", "a, s": 1.0, "step of 219, ms": 19.1}]  # fmt: skip
    lines = record.table(engine.transposed(rows)).splitlines()
    assert lines[0] == "| figure | FLASH_ATTN | express | second / first |"
    assert lines[2:] == ["| a, s | 4.0 | 1.0 | 0.25 |", "| step of 49, ms | 9.2 |  |  |",
                         "| step of 219, ms |  | 19.1 |  |"]  # fmt: skip
