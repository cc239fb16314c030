"""Every change to vLLM that has no extension point: one function each, applied when it is needed.

`tests/contracts/test_patches.py` holds what they rely on against the installed vLLM.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from .edge import admit
from .server.batch import budgets_in
from .server.watch import CACHED
from .settings import Settings, chosen

#: Set on what was put in place of vLLM's own.
PATCHED = "express_patched"
#: The longest message that vLLM cleans: 20 ms at worst, and that grows with its cube.
LONGEST_MESSAGE = 600
#: vLLM's batch runner, as a command and as a program.
BATCH_RUNNERS = ("vllm.entrypoints.launchers.run_batch", "__main__")


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Put `make(original)` in the place of a function, once."""
    original = getattr(owner, name)
    if not hasattr(original, PATCHED):
        ours = functools.wraps(original)(make(original))
        setattr(ours, PATCHED, True)
        setattr(owner, name, ours)


def resolve_at_the_edge() -> None:
    """Have `edge.admit` called on every request that vLLM's input processor makes."""
    from vllm.v1.engine.input_processor import InputProcessor

    def make(original: Any) -> Any:
        def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
            request = original(self, *args, **kwargs)
            if chosen(self.vllm_config):
                admit(request, Settings.of(self.vllm_config))
            return request

        return process_inputs

    _replace(InputProcessor, "process_inputs", make)


def leave_chunked_layers() -> None:
    """Have layers of chunked local attention ask for a backend as sliding-window layers do: they
    are bounded, too, and vLLM does not say so to the platform."""
    from vllm.model_executor.layers.attention import chunked_local_attention

    def make(original: Any) -> Any:
        def get_attn_backend(*args: Any, **kwargs: Any) -> Any:
            return original(*args, has_sliding_window=True, **kwargs)

        return get_attn_backend

    _replace(chunked_local_attention, "get_attn_backend", make)


def name_requests_of_state_models() -> None:
    """Have Model Runner V2 say which requests a batch of a model with state layers holds, as it
    does for other models: its metadata has a place for it."""
    from vllm.v1.worker.gpu.model_states import mamba_hybrid

    def make(original: Any) -> Any:
        def prepare_attn(self: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
            build = mamba_hybrid.build_attn_metadata
            index = input_batch.idx_mapping_np
            mamba_hybrid.build_attn_metadata = functools.partial(build, req_idx=index)
            try:
                return original(self, input_batch, *args, **kwargs)
            finally:
                mamba_hybrid.build_attn_metadata = build

        return prepare_attn

    _replace(mamba_hybrid.MambaHybridModelState, "prepare_attn", make)


def count_cached_tokens_by_sequence() -> None:
    """Have every sequence's output say how many tokens of its prompt were cached.

    vLLM's RequestOutput says it of one sequence.  Of the n that a request may have the first often
    computes the prompt, and the others start from its state.
    """
    from vllm.v1.engine.output_processor import RequestState

    def make(original: Any) -> Any:
        def _new_completion_output(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(self, *args, **kwargs)
            setattr(output, CACHED, self.num_cached_tokens)
            return output

        return _new_completion_output

    _replace(RequestState, "_new_completion_output", make)


def cut_messages_before_cleaning() -> None:
    """Have vLLM cut an error's message before it takes paths out of it.

    Its pattern for paths is cubic in a text such as "/a/a/a": 16 KB of a request, in the name of
    the model for example, stop the server for half a minute.
    """
    from vllm.entrypoints.serve.exception_handling import utils

    def make(original: Any) -> Any:
        def sanitize_message(message: Any) -> str:
            if isinstance(message, str) and len(message) > LONGEST_MESSAGE:
                message = f"{message[:LONGEST_MESSAGE]}... ({len(message)} characters)"
            return original(message)

        return sanitize_message

    original = utils.sanitize_message
    _replace(utils, "sanitize_message", make)
    # Modules that are loaded hold the function by its name; others will take it from utils.
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and vars(module).get("sanitize_message") is original:
            module.sanitize_message = utils.sanitize_message  # type: ignore[attr-defined]


def budgets_in_batches() -> None:
    """Have every line of `vllm run-batch` go through `batch.answer`."""
    for name in BATCH_RUNNERS:
        module = sys.modules.get(name)
        if hasattr(module, "BatchRequestInput") and hasattr(module, "run_request"):
            _replace(module, "run_request", budgets_in)
