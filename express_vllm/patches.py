"""Every change to vLLM that has no extension point: one function each, applied when it is needed.

`tests/test_patches.py` holds what they rely on against the installed vLLM.
"""

from __future__ import annotations

import functools
from typing import Any

from .conflicts import PREFIX_CACHING_ASKED

#: Set on what was put in place of vLLM's own.
PATCHED = "express_patched"


def keep_prefix_caching_asked() -> None:
    """Have a ModelConfig know whether prefix caching was asked for: vLLM fills in its default
    before any configuration that a platform sees."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs._set_default_chunked_prefill_and_prefix_caching_args
    if hasattr(original, PATCHED):
        return

    @functools.wraps(original)
    def set_defaults(self: Any, model_config: Any) -> None:
        if self.enable_prefix_caching is None:
            self.express_filled_in = True  # the next configuration of these arguments finds it set
        elif self.enable_prefix_caching and not hasattr(self, "express_filled_in"):
            setattr(model_config, PREFIX_CACHING_ASKED, True)
        original(self, model_config)

    setattr(set_defaults, PATCHED, True)
    EngineArgs._set_default_chunked_prefill_and_prefix_caching_args = set_defaults
