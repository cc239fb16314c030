"""Wide layers under the real engine on a GPU."""

import pytest
from test_wide import (  # noqa: F401
    test_all_layers_wide_is_a_larger_budget,
    test_the_engine_serves_what_the_harness_measures,
)

pytestmark = pytest.mark.gpu
