"""The server tests on a GPU."""

import pytest
from test_server import *  # noqa: F403

pytestmark = pytest.mark.gpu
