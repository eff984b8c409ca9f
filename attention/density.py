"""How much of dense attention a policy leaves to be computed, counted while it plans."""

from torch import Tensor

from longtake.attention.geometry import AttentionGeometry
from longtake.attention.plan import BlockPlan
from longtake.attention.policies.base import Memory, SparsePolicy


class DensityMeter:
    """Stands in the place of a policy, and counts what it plans.

    Attributes:
        policy: Whose plans are counted.
        num_calls: Plans asked for so far.
        num_dense_calls: Of those, the ones it declined; they count as 1.
        num_pairs: (query, key) pairs there were.
        num_computed: Pairs of them that plans kept, the mean over heads.
    """

    def __init__(self, policy: SparsePolicy) -> None:
        self.policy = policy
        self.num_calls = self.num_dense_calls = 0
        self.num_pairs = self.num_computed = 0.0

    @property
    def is_static(self) -> bool:
        """As the policy's."""
        return self.policy.is_static

    def plan(
        self,
        q: Tensor | None,
        k: Tensor | None,
        geometry: AttentionGeometry,
        *,
        v: Tensor | None = None,
        memory: Memory | None = None,
    ) -> BlockPlan | None:
        """The policy's plan; see ``SparsePolicy.plan``."""
        plan = self.policy.plan(q, k, geometry, v=v, memory=memory)
        pairs = geometry.num_queries * geometry.num_keys
        self.num_calls += 1
        self.num_dense_calls += plan is None
        self.num_pairs += pairs
        self.num_computed += pairs if plan is None else pairs * plan.density()
        return plan

    @property
    def density(self) -> float:
        """Share of all pairs that was computed, 0 to 1; 1 before the first call."""
        return self.num_computed / self.num_pairs if self.num_pairs else 1.0
