"""KV storage and the cache policies, one file per policy."""

from longtake.cache.base import (
    BlockTrace,
    CachePolicy,
    CacheStats,
    Context,
    EncodeJob,
    Event,
    Geometry,
    HeadGroup,
    Pass,
    PolicyState,
    Read,
    Traits,
)
from longtake.cache.frames import FramePlan, FramePolicy
from longtake.cache.kv_cache import Call, KVCache, Run, SparseAttention
from longtake.cache.registry import DEFAULT_POLICY, EXACT_POLICY, POLICIES, make_policy
from longtake.cache.storage import KeysValues, Storage, Stored, TokenBuffer

__all__ = [
    "DEFAULT_POLICY",
    "EXACT_POLICY",
    "POLICIES",
    "BlockTrace",
    "CachePolicy",
    "CacheStats",
    "Call",
    "Context",
    "EncodeJob",
    "Event",
    "FramePlan",
    "FramePolicy",
    "Geometry",
    "HeadGroup",
    "KVCache",
    "KeysValues",
    "Pass",
    "PolicyState",
    "Read",
    "Run",
    "SparseAttention",
    "Storage",
    "Stored",
    "TokenBuffer",
    "Traits",
    "make_policy",
]
