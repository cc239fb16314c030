"""The engine tests with the small model on a CPU (marker `slow`)."""

import models
import pytest
import torch
from test_engine import *  # noqa: F403

pytestmark = [
    pytest.mark.slow, pytest.mark.server,
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu_engine.py runs it"),
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return models.small()
