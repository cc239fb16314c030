"""The server tests on a GPU."""

import pytest
from test_real_server import test_chat_answers  # noqa: F401
from test_server import *  # noqa: F403

pytestmark = pytest.mark.gpu
