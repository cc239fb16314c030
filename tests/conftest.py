"""Shared fixtures: the models, the real text, and one real server for the HTTP tests."""

from __future__ import annotations

import models
import pytest
import realdata
import torch
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
def quick(tmp_path_factory):
    """The model of tests that are not about one: random on a CPU, the small one on a GPU."""
    if torch.cuda.is_available():
        return models.small()
    return models.random(tmp_path_factory.mktemp("random-model"))


@pytest.fixture(scope="session")
def server(quick, tmp_path_factory):
    """`vllm serve ... --attention-backend express`, and every route."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with every_route(quick, log) as running:
        yield running


@pytest.fixture(scope="session")
def small_server(tmp_path_factory):
    """The same with the small model."""
    with every_route(models.small(), tmp_path_factory.mktemp("small-server") / "log") as running:
        yield running


def every_route(model, log):
    more = ("--enable-scale-out", "--enable-prompt-embeds", "--enable-prompt-tokens-details",
            "--dtype", "bfloat16")  # fmt: skip
    return serve(model.path, log, *more, express=model.wide)
