"""Shared fixtures: the small model and one real server for the HTTP tests."""

from __future__ import annotations

import pytest
import realdata
from serving import serve

from express_vllm import smallmodel


@pytest.fixture(scope="session")
def model_path():
    return smallmodel.ensure()


@pytest.fixture(scope="session")
def tokens(model_path):
    """The real text's tokens, some 30,000."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path)(realdata.text())["input_ids"]


@pytest.fixture(scope="session")
def small_config(model_path):
    """The small model's configuration."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model_path)


@pytest.fixture(scope="session")
def server(model_path, tmp_path_factory):
    """`vllm serve ... --attention-backend express` with the small model, and every route."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with serve(model_path, log, "--enable-scale-out", "--enable-prompt-embeds") as running:
        yield running
