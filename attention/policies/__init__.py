"""Sparse attention policies, by the name that YAML and the command line use: one method, one dataclass, one file."""

from collections.abc import Mapping
from typing import Any

from longtake.attention.policies.base import BlockPolicy, Memory, SparsePolicy, StaticPolicy, TokenPolicy
from longtake.configs.fields import make
from longtake.configs.registry import Registry

__all__ = [
    "POLICIES",
    "BlockPolicy",
    "Memory",
    "SparsePolicy",
    "StaticPolicy",
    "TokenPolicy",
    "make_attention_policy",
]

POLICIES = Registry(
    SparsePolicy,
    {
        "dense": "attention.policies.base:Dense",
        "window": "attention.policies.window:Window",
        "radial": "attention.policies.radial:Radial",
        "light_forcing": "attention.policies.light_forcing:LightForcing",
        "svg": "attention.policies.svg:Svg",
        "svg2": "attention.policies.svg2:Svg2",
        "paro": "attention.policies.paro:Paro",
        "sliding_tile": "attention.policies.sliding_tile:SlidingTile",
    },
)


def make_attention_policy(settings: SparsePolicy | Mapping[str, Any] | str) -> SparsePolicy:
    """Make an attention policy from its YAML mapping.

    Args:
        settings: ``{"policy": NAME, field: value, ...}``, a name alone (all defaults), or a policy, which is returned.

    Raises:
        ValueError: If the name or a field is unknown, with the nearest known one, or a value does not fit.
    """
    if isinstance(settings, SparsePolicy):
        return settings
    return make(POLICIES, settings, key="policy", what="attention policy")
