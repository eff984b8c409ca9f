"""What a call asks of a backend, and what a backend answers: plain data, so that verdicts can be tested anywhere."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from longtake.attention.plan import BlockPlan

CODES = (
    "missing_package",
    "version",
    "no_compiler",
    "no_device",
    "arch",
    "dtype",
    "head_dim",
    "feature",
    "download_disabled",
)
"""Why a backend cannot run, for programs; the words beside it are for people."""


class BackendUnavailable(RuntimeError):
    """A backend cannot run a call here.

    Attributes:
        backend: Its name.
        code: One of ``CODES``.
        hint: What to do about it.
    """

    def __init__(self, message: str, *, backend: str, code: str, hint: str) -> None:
        super().__init__(message)
        self.backend = backend
        self.code = code
        self.hint = hint


class Reason(NamedTuple):
    """One reason against: a code of ``CODES``, words, and a remedy that may be empty."""

    code: str
    text: str
    hint: str = ""


@dataclass(frozen=True)
class Verdict:
    """What speaks against a backend for a call, or on this machine; nothing: it can run.

    Attributes:
        reasons: All that was found, the gravest first.
    """

    reasons: tuple[Reason, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether it can run."""
        return not self.reasons

    @property
    def text(self) -> str:
        """All reasons in one line."""
        return "; ".join(reason.text for reason in self.reasons)

    @property
    def hint(self) -> str:
        """The first remedy there is."""
        return next((reason.hint for reason in self.reasons if reason.hint), "")


@dataclass(frozen=True, kw_only=True)
class PlanFacts:
    """What a backend needs to know of a plan to say whether it can run it.

    Attributes:
        density: Share of (query, key) pairs that is computed.
        num_heads: Heads that the plan tells apart, 1 if they share one map.
        q_block: Size of all blocks of queries but the last; None: they vary.
        k_block: Size of all blocks of keys but the last; None: they vary.
        tile: Queries that are computed together, on average: what small matrix products cost depends on it.
    """

    density: float
    num_heads: int
    q_block: int | None
    k_block: int | None
    tile: float

    @classmethod
    def of(cls, plan: BlockPlan) -> "PlanFacts":
        """Look at a plan."""
        q_block, k_block = plan.uniform_block_sizes
        return cls(density=plan.density(), num_heads=plan.num_heads, q_block=q_block, k_block=k_block, tile=plan.tile)

    @property
    def is_full(self) -> bool:
        """Whether every query reads every key, so that the plan is dense attention."""
        return self.density == 1


@dataclass(frozen=True, kw_only=True)
class AttentionRequest:
    """All of a call but its numbers.

    Attributes:
        batch: Samples.
        num_queries: Query tokens.
        num_keys: Key tokens.
        num_heads: Query heads.
        num_kv_heads: Heads of keys and values; divides ``num_heads``.
        head_dim: Size of a head.
        dtype: Of queries, keys and values.
        device: ``cpu``, ``cuda``, ...
        capability: Compute capability of a CUDA device, (major, minor).
        plan: What is known of the plan; None: dense.
        return_lse: Whether the log-sum-exp of the scores is asked for.
        needs_grad: Whether gradients will be.
        has_scale: Whether scores are scaled by something else than head_dim ** -0.5.
    """

    batch: int = 1
    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    capability: tuple[int, int] | None = None
    plan: PlanFacts | None = None
    return_lse: bool = False
    needs_grad: bool = False
    has_scale: bool = False

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: BlockPlan | None = None,
        *,
        scale: float | None = None,
        return_lse: bool = False,
    ) -> "AttentionRequest":
        """Look at a call.

        Args:
            q: (batch, queries, heads, head_dim).
            k: (batch, keys, heads of keys, head_dim).
            v: As ``k``.
            plan: The plan; None: dense.
            scale: What scores are multiplied by; None: head_dim ** -0.5.
            return_lse: Whether the log-sum-exp is asked for.

        Raises:
            ValueError: If shapes, dtypes or devices do not go together, or the plan does not fit them.
        """
        _check(q, k, v)
        if plan is not None:
            _check_plan(q, k, plan)
        return cls(
            batch=q.shape[0],
            num_queries=q.shape[1],
            num_keys=k.shape[1],
            num_heads=q.shape[2],
            num_kv_heads=k.shape[2],
            head_dim=q.shape[3],
            dtype=q.dtype,
            device=q.device.type,
            capability=torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else None,
            plan=None if plan is None else PlanFacts.of(plan),
            return_lse=return_lse,
            needs_grad=torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
            has_scale=scale is not None and scale != q.shape[3] ** -0.5,
        )

    @property
    def signature(self) -> "AttentionRequest":
        """The request without what changes from plan to plan of one kind."""
        return self if self.plan is None else replace(self, plan=replace(self.plan, density=0.0, tile=0.0))


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or v.shape != k.shape:
        raise ValueError(f"{shapes}: give (batch, tokens, heads, head_dim), and v in the shape of k.")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"{shapes}: batch and head_dim must be equal, and heads of keys divide those of queries.")
    if not q.shape[1] or not k.shape[1]:
        raise ValueError(f"{shapes}: give at least one query and one key.")
    if (
        not q.dtype.is_floating_point
        or len({q.dtype, k.dtype, v.dtype}) > 1
        or len({q.device, k.device, v.device}) > 1
    ):
        kinds = ", ".join(f"{x.dtype} on {x.device}".removeprefix("torch.") for x in (q, k, v))
        raise ValueError(f"q, k, v are {kinds}: give one floating-point dtype on one device.")


def _check_plan(q: Tensor, k: Tensor, plan: BlockPlan) -> None:
    if (plan.num_queries, plan.num_keys) != (q.shape[1], k.shape[1]):
        raise ValueError(
            f"the plan is for {plan.num_queries} queries and {plan.num_keys} keys but q has {q.shape[1]} and k "
            f"{k.shape[1]}: make it from the geometry of this call."
        )
    if plan.num_heads not in (1, q.shape[2]):
        raise ValueError(
            f"the plan tells {plan.num_heads} heads apart but q has {q.shape[2]} in a batch of {q.shape[0]}: "
            "give one map for all heads, one for every head, or one for every head of every sample."
        )
