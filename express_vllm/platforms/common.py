"""What every express platform does; unchanged vLLM behaviour when express is not chosen."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ..conflicts import refuse_conflicts
from ..patches import (
    count_cached_tokens_by_sequence,
    leave_chunked_layers,
    resolve_at_the_edge,
)
from ..plugin import BACKEND_NAME, BACKEND_PATH
from ..server.middleware import add_to
from ..settings import Settings, chosen

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.express")

#: By whether scheduling is asynchronous.
SCHEDULERS = {
    False: "express_vllm.scheduler.scheduler.ExpressScheduler",
    True: "express_vllm.scheduler.scheduler.ExpressAsyncScheduler",
}


class ExpressPlatformMixin:
    """Overrides shared by the platforms; comes before the vLLM platform in the bases."""

    express_worker: str

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        ours = selected_backend is not None and selected_backend.name == BACKEND_NAME
        if ours and attn_selector_config.has_sliding_window:  # bounded by itself
            ours, selected_backend = False, None
        if not ours:
            return super().get_attn_backend_cls(  # type: ignore[misc]
                selected_backend, attn_selector_config, num_heads
            )
        # vLLM's attention modules, which ask for the platform that is being made here.
        from express_vllm.backend.attention import ExpressBackend

        ExpressBackend.check_layer(attn_selector_config)
        return BACKEND_PATH

    @classmethod
    def pre_register_and_update(cls, parser: Any = None) -> None:
        """Give every API server our middleware; it does nothing unless express is chosen."""
        super().pre_register_and_update(parser)  # type: ignore[misc]
        if parser is not None:
            add_to(parser)

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        if not chosen(vllm_config):
            super().check_and_update_config(vllm_config)  # type: ignore[misc]
            return
        refuse_conflicts(vllm_config)
        settings = Settings.parse(vllm_config)
        if settings.layers.bounded and vllm_config.cache_config.enable_prefix_caching:
            _switch_off_prefix_caching(vllm_config, settings.layers.states)
        if vllm_config.parallel_config.worker_cls == "auto":
            vllm_config.parallel_config.worker_cls = cls.express_worker
        super().check_and_update_config(vllm_config)  # type: ignore[misc]
        scheduler = vllm_config.scheduler_config  # the platform has just settled which it is
        scheduler.scheduler_cls = SCHEDULERS[bool(scheduler.async_scheduling)]
        resolve_at_the_edge()
        leave_chunked_layers()
        count_cached_tokens_by_sequence()
        logger.info("express: %s", settings.config)

    @classmethod
    def register_custom_kv_cache_specs(cls, vllm_config: VllmConfig) -> None:
        super().register_custom_kv_cache_specs(vllm_config)  # type: ignore[misc]
        from express_vllm.scheduler import register_spec

        register_spec()


def _switch_off_prefix_caching(vllm_config: VllmConfig, states: bool) -> None:
    """Before vLLM reads the setting; it has already sized the blocks of state layers by it."""
    logger.warning(
        "express: prefix caching is off for this model: what is cached does not hold its "
        "sliding-window, chunked or state layers yet"
    )
    cache = vllm_config.cache_config
    cache.enable_prefix_caching = False
    if states:
        from vllm.model_executor.models.config import MambaModelConfig

        cache.mamba_block_size = None
        MambaModelConfig.verify_and_update_config(vllm_config)
