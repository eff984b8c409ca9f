"""Which policies there are, by the name that YAML and the command line use."""

from collections.abc import Mapping
from typing import Any

from longtake.cache.attention_sink import AttentionSink
from longtake.cache.base import CachePolicy
from longtake.cache.deep_forcing import DeepForcing
from longtake.cache.full import Full
from longtake.cache.sliding_window import SlidingWindow
from longtake.configs.fields import make

POLICIES: dict[str, type[CachePolicy]] = {
    "full": Full,
    "sliding_window": SlidingWindow,
    "attention_sink": AttentionSink,
    "deep_forcing": DeepForcing,
}

DEFAULT_POLICY = "attention_sink"
"""What videos are made with unless told otherwise: bounded, and no position leaves the trained range."""

EXACT_POLICY = "full"
"""What a bare rollout uses unless told otherwise: nothing is lost."""


def make_policy(settings: CachePolicy | Mapping[str, Any] | str) -> CachePolicy:
    """Make a policy from its YAML mapping.

    Args:
        settings: ``{"policy": NAME, field: value, ...}``, a name alone (all defaults), or a policy, which is returned.

    Raises:
        ValueError: If the name or a field is unknown, with the nearest known one, or a value does not fit.
    """
    if isinstance(settings, CachePolicy):
        return settings
    return make(POLICIES, settings, key="policy", what="cache policy")
