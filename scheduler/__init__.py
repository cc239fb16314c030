"""KV-cache spec, block manager and scheduler: budgets become blocks and a step plan."""


def register_spec() -> None:
    """Make vLLM's block managers know the express KV-cache spec (idempotent)."""
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from .manager import ExpressManager
    from .spec import ExpressSpec

    KVCacheSpecRegistry.register(ExpressSpec, manager_class=ExpressManager)
