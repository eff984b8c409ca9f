"""The contract of a sparse attention policy: from the geometry and tokens of a call to the blocks that are computed.

A policy knows no kernel; a ``BlockPlan`` is all that it gives. It may decline with None, and the call is dense.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, MutableMapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from longtake.attention.geometry import AttentionGeometry
from longtake.attention.plan import BlockPlan
from longtake.configs.fields import make
from longtake.configs.registry import Registry

T = TypeVar("T")

Memory = MutableMapping[Any, Any]
"""State of a policy between the calls of a rollout. The caller owns it and begins every video with an empty one."""


_Given = tuple[Tensor | None, Tensor | None, Tensor | None]  # queries, keys and values as a policy is given them


class Tokens(NamedTuple):
    """Queries, keys and values of one sample, (tokens, heads, head_dim); keys may have fewer heads than queries."""

    q: Tensor
    k: Tensor
    v: Tensor


class Recent(Generic[T]):
    """The values used last, by key. They are pure functions of their keys, so no rollout can notice another."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._values: OrderedDict[Hashable, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = self._values[key] = make()
        if len(self._values) > self.most:
            self._values.popitem(last=False)
        return value


@dataclass(frozen=True, kw_only=True)
class SparsePolicy(ABC):
    """Validated settings that turn attention calls into plans."""

    name: ClassVar[str]  # key in YAML and on the command line
    source: ClassVar[str]  # paper or repository
    needs_values: ClassVar[bool] = False  # ``plan`` has to be given the values
    needs_frames: ClassVar[bool] = False  # every key has to be of a whole frame
    has_bidirectional_form: ClassVar[bool] = True  # it means something where every frame asks every frame
    is_static: ClassVar[bool] = True  # plans follow from the geometry alone, not from the tokens of a sample

    def plan(
        self,
        q: Tensor | None,
        k: Tensor | None,
        geometry: AttentionGeometry,
        *,
        v: Tensor | None = None,
        memory: Memory | None = None,
    ) -> BlockPlan | None:
        """Choose the blocks of keys that every block of queries reads, or None: compute this call densely.

        Args:
            q: (1, queries, heads, head_dim), rotated; a static policy takes any batch, or None.
            k: (1, keys, key heads, head_dim), rotated; likewise. The heads of q are a multiple of its heads.
            geometry: Frames of the queries and keys.
            v: Values, where ``needs_values``; as k.
            memory: Kept between calls; None: every call is the first.

        Raises:
            ValueError: If the geometry is one the policy has no meaning for, or the tokens do not fit it.
        """
        if q is not None and k is not None and (q.shape[1], k.shape[1]) != (geometry.num_queries, geometry.num_keys):
            raise ValueError(
                f"{q.shape[1]} queries and {k.shape[1]} keys do not fit the geometry, "
                f"which has {geometry.num_queries} and {geometry.num_keys}: describe this call."
            )
        return None if self.is_dense(geometry) else self._plan((q, k, v), geometry, {} if memory is None else memory)

    @abstractmethod
    def is_dense(self, geometry: AttentionGeometry) -> bool:
        """True if a call is computed densely whatever its tokens."""

    def _plan(self, given: _Given, geometry: AttentionGeometry, memory: Memory) -> BlockPlan | None:
        return None

    def settings(self) -> dict[str, Any]:
        return {"policy": self.name} | {f.name: getattr(self, f.name) for f in fields(self)}

    def _check_least(self, least: int, *names: str) -> None:
        for name in names:
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be {least} or more.")

    def _check_share(self, name: str) -> None:
        if not 0 < getattr(self, name) <= 1:
            raise ValueError(f"{name}={getattr(self, name)} must be above 0 and at most 1.")


@dataclass(frozen=True, kw_only=True)
class Dense(SparsePolicy):
    """Every query reads every key: no plan at all."""

    name: ClassVar[str] = "dense"
    source: ClassVar[str] = "Attention Is All You Need, arXiv:1706.03762"

    def is_dense(self, geometry: AttentionGeometry) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class BlockPolicy(SparsePolicy):
    """A policy with a dense beginning: what comes first, and what is kept, is read by all that follows.

    A model that was not trained with a mask loses quality with it, a causal model more than others: errors spread from
    block to block through the cache. The defaults spare what they would spread from.
    """

    dense_blocks: int = 1  # blocks of a rollout that are computed densely; no meaning in the bidirectional form
    dense_layers: int = 1  # first layers
    dense_steps: int = 1  # first denoising steps of every block
    commit_pass: Literal["dense", "sparse"] = "dense"  # the pass that fills the cache

    def __post_init__(self) -> None:
        self._check_least(0, "dense_blocks", "dense_layers", "dense_steps")

    def is_dense(self, geometry: AttentionGeometry) -> bool:
        if geometry.frames_per_block is not None and geometry.block_index < self.dense_blocks:
            return True
        if geometry.kind == "commit":
            return self.commit_pass == "dense" or geometry.layer < self.dense_layers
        return geometry.layer < self.dense_layers or geometry.step_index < self.dense_steps


@dataclass(frozen=True, kw_only=True)
class TokenPolicy(BlockPolicy):
    """A policy that chooses blocks by the tokens of a sample."""

    is_static: ClassVar[bool] = False

    def _plan(self, given: _Given, geometry: AttentionGeometry, memory: Memory) -> BlockPlan | None:
        q, k, v = given
        prefix = f"attention policy {self.name!r}"
        if q is None or k is None or (self.needs_values and v is None):
            needed = "q, k and v" if self.needs_values else "q and k"
            raise ValueError(f"{prefix} chooses blocks by the tokens: give it {needed}.")
        if q.shape[0] != 1 or k.shape[0] != 1:
            raise ValueError(
                f"{prefix} makes a plan for one sample, and got {q.shape[0]}: sparse_attention goes through them."
            )
        return self.token_plan(Tokens(q[0], k[0], k[0] if v is None else v[0]), geometry, memory)

    @abstractmethod
    def token_plan(self, tokens: Tokens, geometry: AttentionGeometry, memory: Memory) -> BlockPlan | None:
        """Choose blocks by the tokens; the values are right only where ``needs_values``."""


@dataclass(frozen=True, kw_only=True)
class StaticPolicy(BlockPolicy):
    """A policy that looks at the geometry only, so that equal layouts share one plan."""

    def _plan(self, given: _Given, geometry: AttentionGeometry, memory: Memory) -> BlockPlan | None:
        def shared() -> BlockPlan | None:
            return _PLANS.get((self, "rules", self.rules(geometry)), lambda: self.layout_plan(geometry))

        return _PLANS.get((self, geometry.layout), shared)

    def rules(self, geometry: AttentionGeometry) -> Hashable:
        """The part of the layout that the plan depends on: layouts with equal rules share a plan."""
        return geometry.layout

    @abstractmethod
    def layout_plan(self, geometry: AttentionGeometry) -> BlockPlan | None:
        """Make the plan; its result is kept, and must depend on ``rules`` and the settings alone."""


_PLANS: Recent[BlockPlan | None] = Recent(128)


class DensityMeter:
    """A stand-in for a policy that counts the share of dense attention its plans leave to be computed."""

    def __init__(self, policy: SparsePolicy) -> None:
        self.policy = policy
        self.is_static = policy.is_static
        self.num_calls = self.num_dense_calls = 0  # of them, those that the policy declined
        self.num_pairs = self.num_computed = 0.0  # (query, key) pairs, and those that plans kept, the mean over heads

    def plan(self, q: Tensor | None, k: Tensor | None, geometry: AttentionGeometry, **given: Any) -> BlockPlan | None:
        plan = self.policy.plan(q, k, geometry, **given)
        pairs = geometry.num_queries * geometry.num_keys
        self.num_calls += 1
        self.num_dense_calls += plan is None
        self.num_pairs += pairs
        self.num_computed += pairs if plan is None else pairs * plan.density
        return plan

    @property
    def density(self) -> float:
        """Share of all pairs that was computed, 0 to 1; 1 before the first call."""
        return self.num_computed / self.num_pairs if self.num_pairs else 1.0


def shared_heads(k: Tensor, num_heads: int) -> Tensor:
    """Repeat (tokens, heads, ...) of fewer key heads, so that there is one for every query head."""
    return k if k.shape[1] == num_heads else k.repeat_interleave(num_heads // k.shape[1], dim=1)


def block_means(x: Tensor, edges: Tensor) -> Tensor:
    """Average (tokens, heads, head_dim) over blocks of any sizes, none empty: (blocks, heads, head_dim), float32."""
    edges = edges.to(x.device, torch.long)
    sizes = edges.diff()
    if x.device.type == "cpu":
        block = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        return sum_by_group(x.float(), block, len(sizes)) / sizes[:, None, None]
    return _padded_means(x, edges, sizes)


def _padded_means(x: Tensor, edges: Tensor, sizes: Tensor) -> Tensor:
    """Means of blocks that are all filled up to the longest: one sum each, in one order."""
    place = torch.arange(int(sizes.max()), device=x.device)
    tokens = (edges[:-1, None] + place).clamp(max=len(x) - 1)
    is_own = (place < sizes[:, None])[..., None, None]
    return x[tokens].float().where(is_own, 0).sum(1) / sizes[:, None, None]


def sum_by_group(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Add up (rows, ...) by the group of each row, in an order that is the same in every run; a group may be empty."""
    if values.device.type == "cpu":
        return values.new_zeros(num_groups, *values.shape[1:]).index_add_(0, group, values)
    return _product_sums(values, group, num_groups)


def _product_sums(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Sums as a product of matrices: GPUs add by index in whatever order threads come, products do not."""
    is_member = (group == torch.arange(num_groups, device=values.device)[:, None]).to(values)
    return (is_member @ values.flatten(1)).view(num_groups, *values.shape[1:])


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
