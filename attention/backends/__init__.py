"""Attention backends, by the name that YAML and the command line use."""

from functools import cache

from longtake.attention.backends import packages, pytorch
from longtake.attention.backends.base import AttentionCall, AttentionRequest, Backend, BackendUnavailable
from longtake.configs.fields import choose

__all__ = ["BACKENDS", "AttentionCall", "AttentionRequest", "Backend", "BackendUnavailable", "find_backend"]

_sdpa, *_others = pytorch.BACKENDS
_zentorch, *_dense = packages.BACKENDS
BACKENDS = {cls.name: cls for cls in (_sdpa, _zentorch, *_others, *_dense)}


@cache
def find_backend(name: str) -> Backend:
    """Look a backend up by its name, or refuse it with the nearest one; backends hold no state."""
    return choose(BACKENDS, name, what="attention backend")()
