"""Which policies there are, by the name that YAML and the command line use."""

from collections.abc import Mapping
from typing import Any

from longtake.cache.base import CachePolicy
from longtake.cache.policies.anchor import Anchor
from longtake.cache.policies.attention_sink import AttentionSink
from longtake.cache.policies.deep_forcing import DeepForcing
from longtake.cache.policies.dilated_window import DilatedWindow
from longtake.cache.policies.ema_sink import EmaSink
from longtake.cache.policies.forcing_kv import ForcingKV
from longtake.cache.policies.full import Full
from longtake.cache.policies.infinity_rope import InfinityRope
from longtake.cache.policies.longlive import LongLive
from longtake.cache.policies.memrope import MemRoPE
from longtake.cache.policies.pack import Pack
from longtake.cache.policies.relax import Relax
from longtake.cache.policies.rolling_forcing import RollingForcing
from longtake.cache.policies.rolling_sink import RollingSink
from longtake.cache.policies.sliding_window import SlidingWindow
from longtake.cache.policies.slow_fast import SlowFast
from longtake.cache.policies.tempcache import TempCache
from longtake.cache.wrappers.budget import Budget
from longtake.cache.wrappers.commit_reads import CommitReads
from longtake.cache.wrappers.offloaded import Offloaded
from longtake.cache.wrappers.quantized import Quantized
from longtake.configs.fields import make

POLICIES: dict[str, type[CachePolicy]] = {
    "full": Full,
    "sliding_window": SlidingWindow,
    "dilated_window": DilatedWindow,
    "attention_sink": AttentionSink,
    "longlive": LongLive,
    "infinity_rope": InfinityRope,
    "anchor": Anchor,
    "pack": Pack,
    "deep_forcing": DeepForcing,
    "ema_sink": EmaSink,
    "memrope": MemRoPE,
    "rolling_sink": RollingSink,
    "relax": Relax,
    "slow_fast": SlowFast,
    "quantized": Quantized,
    "offloaded": Offloaded,
    "commit_reads": CommitReads,
    "budget": Budget,
    "tempcache": TempCache,
    "rolling_forcing": RollingForcing,
    "forcing_kv": ForcingKV,
}

DEFAULT_POLICY = "attention_sink"
"""What videos are made with unless told otherwise: bounded, and no position leaves the trained range."""

EXACT_POLICY = "full"
"""What a bare rollout uses unless told otherwise: nothing is lost."""


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
