"""Every query reads every key."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from longtake.attention.geometry import AttentionGeometry
from longtake.attention.plan import BlockPlan
from longtake.attention.policies.base import Memory, SparsePolicy


@dataclass(frozen=True, kw_only=True)
class Dense(SparsePolicy):
    """No plan at all."""

    name: ClassVar[str] = "dense"
    source: ClassVar[str] = "Attention Is All You Need, arXiv:1706.03762"

    def plan(
        self,
        q: Tensor | None,
        k: Tensor | None,
        geometry: AttentionGeometry,
        *,
        v: Tensor | None = None,
        memory: Memory | None = None,
    ) -> BlockPlan | None:
        """Always None."""
        return None
