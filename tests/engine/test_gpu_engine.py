"""The engine tests on a GPU: the Triton kernels under Model Runner V2."""

import pytest
from test_engine import *  # noqa: F403

pytestmark = pytest.mark.gpu
