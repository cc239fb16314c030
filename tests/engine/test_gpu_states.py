"""Cached states on a GPU: the Triton kernels under Model Runner V2, scheduled asynchronously."""

import pytest
from test_states import *  # noqa: F403

pytestmark = pytest.mark.gpu
