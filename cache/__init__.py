"""KV storage and the cache policies, one file per policy."""

from collections.abc import Mapping
from typing import Any

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
from longtake.cache.storage import KeysValues, Storage, Stored, TokenBuffer
from longtake.configs.fields import make
from longtake.configs.registry import POLICY_GROUP, Registry

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

POLICIES = Registry(
    CachePolicy,
    {
        "full": "cache.policies.full:Full",
        "sliding_window": "cache.policies.sliding_window:SlidingWindow",
        "dilated_window": "cache.policies.dilated_window:DilatedWindow",
        "attention_sink": "cache.policies.attention_sink:AttentionSink",
        "longlive": "cache.policies.longlive:LongLive",
        "infinity_rope": "cache.policies.infinity_rope:InfinityRope",
        "anchor": "cache.policies.anchor:Anchor",
        "pack": "cache.policies.pack:Pack",
        "deep_forcing": "cache.policies.deep_forcing:DeepForcing",
        "ema_sink": "cache.policies.ema_sink:EmaSink",
        "memrope": "cache.policies.memrope:MemRoPE",
        "rolling_sink": "cache.policies.rolling_sink:RollingSink",
        "relax": "cache.policies.relax:Relax",
        "slow_fast": "cache.policies.slow_fast:SlowFast",
        "quantized": "cache.wrappers.quantized:Quantized",
        "offloaded": "cache.wrappers.offloaded:Offloaded",
        "commit_reads": "cache.wrappers.commit_reads:CommitReads",
        "budget": "cache.wrappers.budget:Budget",
        "tempcache": "cache.policies.tempcache:TempCache",
        "rolling_forcing": "cache.policies.rolling_forcing:RollingForcing",
        "forcing_kv": "cache.policies.forcing_kv:ForcingKV",
    },
    group=POLICY_GROUP,
)

DEFAULT_POLICY = "attention_sink"  # default of videos: bounded, and no position leaves the trained range

EXACT_POLICY = "full"  # default of a bare rollout: nothing is lost


def make_policy(settings: CachePolicy | Mapping[str, Any] | str) -> CachePolicy:
    """Make a policy from its YAML mapping.

    Args:
        settings: ``{"policy": NAME, field: value, ...}``, a name alone (all defaults), or a policy, which is returned.
            ``inner``, where a policy takes one, is any of these itself.

    Raises:
        ValueError: If the name or a field is unknown, with the nearest known one, or a value does not fit.
    """
    if isinstance(settings, CachePolicy):
        return settings
    if isinstance(settings, Mapping) and "inner" in settings:
        settings = {**settings, "inner": make_policy(settings["inner"])}
    return make(POLICIES, settings, key="policy", what="cache policy")
