"""KV storage and the cache policies, one file per policy."""

from longtake.cache.base import (
    BlockTrace,
    CachePolicy,
    CacheStats,
    Context,
    EncodeJob,
    Geometry,
    Pass,
    PolicyState,
    Read,
)
from longtake.cache.frames import FramePlan, FramePolicy
from longtake.cache.kv_cache import KVCache
from longtake.cache.registry import POLICIES, make_policy

__all__ = [
    "POLICIES",
    "BlockTrace",
    "CachePolicy",
    "CacheStats",
    "Context",
    "EncodeJob",
    "FramePlan",
    "FramePolicy",
    "Geometry",
    "KVCache",
    "Pass",
    "PolicyState",
    "Read",
    "make_policy",
]
