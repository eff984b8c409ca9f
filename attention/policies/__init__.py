"""Sparse attention policies, by the name that YAML and the command line use: one method, one dataclass, one file."""

from collections.abc import Mapping
from typing import Any

from longtake.attention.policies.base import BlockPolicy, Dense, Memory, SparsePolicy, StaticPolicy, TokenPolicy
from longtake.attention.policies.light_forcing import LightForcing
from longtake.attention.policies.paro import Paro
from longtake.attention.policies.radial import Radial
from longtake.attention.policies.sliding_tile import SlidingTile
from longtake.attention.policies.svg import Svg
from longtake.attention.policies.svg2 import Svg2
from longtake.attention.policies.window import Window
from longtake.configs.fields import make

__all__ = [
    "POLICIES",
    "BlockPolicy",
    "Memory",
    "SparsePolicy",
    "StaticPolicy",
    "TokenPolicy",
    "make_attention_policy",
]

POLICIES: dict[str, type[SparsePolicy]] = {
    cls.name: cls for cls in (Dense, Window, Radial, LightForcing, Svg, Svg2, Paro, SlidingTile)
}


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
