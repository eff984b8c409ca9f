"""Which policies there are, by the name that YAML and the command line use."""

from collections.abc import Mapping
from typing import Any

from longtake.cache.anchor import Anchor
from longtake.cache.attention_sink import AttentionSink
from longtake.cache.base import CachePolicy
from longtake.cache.budget import Budget
from longtake.cache.commit_reads import CommitReads
from longtake.cache.deep_forcing import DeepForcing
from longtake.cache.dilated_window import DilatedWindow
from longtake.cache.ema_sink import EmaSink
from longtake.cache.forcing_kv import ForcingKV
from longtake.cache.full import Full
from longtake.cache.infinity_rope import InfinityRope
from longtake.cache.longlive import LongLive
from longtake.cache.memrope import MemRoPE
from longtake.cache.offloaded import Offloaded
from longtake.cache.pack import Pack
from longtake.cache.quantized import Quantized
from longtake.cache.relax import Relax
from longtake.cache.rolling_forcing import RollingForcing
from longtake.cache.rolling_sink import RollingSink
from longtake.cache.sliding_window import SlidingWindow
from longtake.cache.slow_fast import SlowFast
from longtake.cache.tempcache import TempCache
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
