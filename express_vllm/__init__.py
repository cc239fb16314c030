"""Bounded, per-request KV caches for vLLM."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("express-vllm")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
