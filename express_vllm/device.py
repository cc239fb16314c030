"""Which device path runs: the Triton kernels or the CPU kernels."""

from __future__ import annotations

import os


def uses_triton() -> bool:
    """Whether the Triton kernels run: on a GPU or, for tests, in Triton's interpreter."""
    from vllm.platforms import current_platform  # known only when all platforms are registered

    return current_platform.is_cuda() or os.environ.get("TRITON_INTERPRET") == "1"
