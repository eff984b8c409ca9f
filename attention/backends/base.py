"""The contract of an attention backend: capabilities as data, verdicts by request, and one way to run."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from longtake.attention.plan import BlockPlan

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

Code = Literal["missing_package", "version", "no_compiler", "no_device", "arch", "dtype", "head_dim", "feature"]
"""Why a backend cannot run, for programs; the words beside the code are for people."""

Result = tuple[Tensor, Tensor | None]
"""(batch, queries, heads, head_dim) in the dtype of the queries; and, where it is asked for, the natural logarithm of
the sum of exponentials, (batch, heads, queries), float32 or wider."""


class BackendUnavailable(RuntimeError):
    """A backend cannot run a call here; ``code`` is one of ``Code``, ``hint`` the remedy."""

    def __init__(self, message: str, *, backend: str, code: Code, hint: str) -> None:
        super().__init__(message)
        self.backend = backend
        self.code = code
        self.hint = hint


class Reason(NamedTuple):
    """One reason against a backend, and a remedy that may be empty."""

    text: str
    code: Code = "feature"
    hint: str = ""


@dataclass(frozen=True)
class Verdict:
    """All reasons against a backend for a call, or on this machine, the gravest first; none: it can run."""

    reasons: tuple[Reason, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.reasons

    @property
    def text(self) -> str:
        return "; ".join(reason.text for reason in self.reasons)

    @property
    def hint(self) -> str:
        return next((reason.hint for reason in self.reasons if reason.hint), "")


@dataclass(frozen=True, kw_only=True)
class PlanFacts:
    """Properties of a block plan that decide how a backend runs it, and whether it can."""

    density: float  # share of (query, key) pairs that is computed; 1: the plan is dense attention
    num_heads: int  # maps, 1 if all heads share one
    q_block: int | None  # size of all blocks of queries but the last; None: it varies
    k_block: int | None
    tile: float  # queries that are computed together, on average


class AttentionCall(NamedTuple):
    """Tensors and options of a call, as ``longtake.attention.attention`` takes them."""

    q: Tensor
    k: Tensor
    v: Tensor
    plan: BlockPlan | None = None
    scale: float | None = None
    return_lse: bool = False

    @property
    def blocks(self) -> BlockPlan:
        if self.plan is None:
            raise ValueError("this backend is only for block plans: give one, or use 'sdpa'.")
        return self.plan

    @property
    def factor(self) -> float:
        return float(self.q.shape[-1] ** -0.5) if self.scale is None else self.scale

    @property
    def needs_grad(self) -> bool:
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.k, self.v))


@dataclass(frozen=True, kw_only=True)
class AttentionRequest:
    """Shapes, types and options of a call without its numbers."""

    batch: int = 1
    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    capability: tuple[int, int] | None = None  # of a CUDA device
    plan: PlanFacts | None = None  # None: dense
    return_lse: bool = False
    needs_grad: bool = False
    has_scale: bool = False  # scores are scaled by something else than head_dim ** -0.5

    @classmethod
    def of(cls, call: AttentionCall) -> "AttentionRequest":
        """Describe a call.

        Raises:
            ValueError: If shapes, dtypes or devices do not go together, or the plan does not fit them.
        """
        q, k, v, plan, scale, return_lse = call
        _check_tensors(q, k, v)
        facts = None
        if plan is not None:
            _check_plan(q, k, plan)
            q_block, k_block = plan.uniform_block_sizes
            density, num_heads, tile = plan.density, plan.num_heads, plan.tile
            facts = PlanFacts(density=density, num_heads=num_heads, q_block=q_block, k_block=k_block, tile=tile)
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
            plan=facts,
            return_lse=return_lse,
            needs_grad=call.needs_grad,
            has_scale=scale is not None and scale != q.shape[3] ** -0.5,
        )

    @property
    def signature(self) -> "AttentionRequest":
        """The request without the numbers that change from plan to plan of one kind."""
        return self if self.plan is None else replace(self, plan=replace(self.plan, density=0.0, tile=0.0))


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Capabilities of a backend."""

    devices: tuple[str, ...] = ("cuda",)
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    min_capability: tuple[int, int] = (0, 0)  # lowest compute capability, on CUDA devices
    max_head_dim: int | None = None
    head_dim_step: int = 1  # head_dim must be a multiple of it
    plans: Literal["none", "any", "only"] = "none"  # only: every call needs one
    lse: bool = True  # it returns the log-sum-exp
    grouped: bool = True  # there may be fewer heads of keys than of queries
    backward: bool = True


class Backend(ABC):
    """One way to compute attention."""

    name: ClassVar[str]  # key in YAML and on the command line
    limits: ClassVar[Limits]
    exact: ClassVar[bool] = True  # softmax attention up to rounding; quantised kernels are not
    # Kinds of device where the project has run it against the reference; ``auto`` takes no other
    verified_on: ClassVar[frozenset[str]] = frozenset()
    package: ClassVar[str | None] = None  # distribution it needs beyond PyTorch
    module: ClassVar[str] = ""  # of that distribution, looked for without importing it
    install: ClassVar[str] = ""  # command that installs the distribution

    @classmethod
    def available(cls) -> Verdict:
        """Say whether this machine has the package; imports nothing and touches no device."""
        return Verdict() if cls.package is None else _installed(cls.package, cls.module, cls.install)

    @classmethod
    def supports(cls, request: AttentionRequest) -> Verdict:
        """Say whether it could take a call where it is available: a pure function of the request."""
        limits = cls.limits
        reasons = (*_device_reasons(limits, request), *_feature_reasons(limits, request), *cls._own_reasons(request))
        return Verdict(reasons)

    @classmethod
    def _own_reasons(cls, request: AttentionRequest) -> Iterator[Reason]:
        """Reasons that ``limits`` does not say."""
        yield from ()

    def run(self, call: AttentionCall) -> Result:
        """Compute attention, or raise ``BackendUnavailable``; ``supports`` and ``BlockPlan.validate`` were asked."""
        q, k, v, plan, _, _ = call
        if plan is None or (plan.q_perm is None and plan.k_perm is None):
            return self._execute(call)
        if plan.k_perm is not None:
            if plan.k_perm.shape[0] > k.shape[2]:
                k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
            k, v = (x.gather(1, _places(plan.k_perm, x)) for x in (k, v))
        call = call._replace(k=k, v=v, plan=plan.without_order())
        if plan.q_perm is None:
            return self._execute(call)
        places = _places(plan.q_perm, q)
        out, lse = self._execute(call._replace(q=q.gather(1, places)))
        out = torch.empty_like(out).scatter_(1, places, out)
        if lse is not None:
            lse = torch.empty_like(lse).scatter_(2, places[..., 0].transpose(1, 2), lse)
        return out, lse

    @abstractmethod
    def _execute(self, call: AttentionCall) -> Result:
        """Compute attention over tokens that stand in the plan's order already."""

    @classmethod
    def _unusable(cls, text: str, code: Code, hint: str = "") -> BackendUnavailable:
        hint = hint or f"Install with: {cls.install}."
        message = f"backend {cls.name!r} is not usable: {text}. {hint}"
        return BackendUnavailable(message, backend=cls.name, code=code, hint=hint)


@cache
def _installed(package: str, module: str, install: str) -> Verdict:
    """Look for a distribution by its metadata or, for builds without any, by its module."""
    try:
        version(package)
    except PackageNotFoundError:
        if "." in module or find_spec(module) is None:
            text = f"package {package!r} is not installed"
            return Verdict((Reason(text, "missing_package", f"Install with: {install}."),))
    return Verdict()


def _names(*dtypes: torch.dtype) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _device_reasons(limits: Limits, request: AttentionRequest) -> Iterator[Reason]:
    if request.device not in limits.devices:
        text = f"it has no kernels for {request.device}, only for {', '.join(limits.devices)}"
        yield Reason(text, "no_device")
    elif request.capability is not None and request.capability < limits.min_capability:
        has, needs = (".".join(map(str, capability)) for capability in (request.capability, limits.min_capability))
        yield Reason(f"it needs compute capability {needs} or more and this device has {has}", "arch")
    if request.dtype not in limits.dtypes:
        text = f"it takes {_names(*limits.dtypes)}, not {_names(request.dtype)}"
        yield Reason(text, "dtype", f"Convert q, k and v to {_names(limits.dtypes[-1])}.")
    most, step = limits.max_head_dim, limits.head_dim_step
    if (most is not None and request.head_dim > most) or request.head_dim % step:
        limit = f"head_dim up to {most}" if most is not None else "head_dim"
        yield Reason(f"it takes {limit} in steps of {step}, not {request.head_dim}", "head_dim")


def _feature_reasons(limits: Limits, request: AttentionRequest) -> Iterator[Reason]:
    if request.plan is not None and limits.plans == "none":
        yield Reason("it has no block sparsity")
    if request.plan is None and limits.plans == "only":
        yield Reason("it is only for block plans, and there is none")
    if request.return_lse and not limits.lse:
        yield Reason("it does not return the log-sum-exp")
    if request.num_heads != request.num_kv_heads and not limits.grouped:
        yield Reason(f"keys must have as many heads as queries, not {request.num_kv_heads} for {request.num_heads}")
    if request.needs_grad and not limits.backward:
        yield Reason("it has no gradients")


def _places(order: Tensor, x: Tensor) -> Tensor:
    """Expand an order per head to an index into (batch, tokens, heads, head_dim)."""
    order = order.to(x.device).expand(x.shape[2], -1).transpose(0, 1)
    return order[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[3])


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or v.shape != k.shape:
        raise ValueError(f"{shapes}: give (batch, tokens, heads, head_dim), and v in the shape of k.")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"{shapes}: batch and head_dim must be equal, and heads of keys divide those of queries.")
    if not q.shape[1] or not k.shape[1]:
        raise ValueError(f"{shapes}: give at least one query and one key.")
    if not q.dtype.is_floating_point or len({(x.dtype, x.device) for x in (q, k, v)}) > 1:
        kinds = ", ".join(f"{_names(x.dtype)} on {x.device}" for x in (q, k, v))
        raise ValueError(f"q, k, v are {kinds}: give one floating-point dtype on one device.")


def _check_plan(q: Tensor, k: Tensor, plan: BlockPlan) -> None:
    if (plan.num_queries, plan.num_keys) != (q.shape[1], k.shape[1]):
        raise ValueError(
            f"the plan is for {plan.num_queries} queries and {plan.num_keys} keys but q has {q.shape[1]} and k "
            f"{k.shape[1]}: make it from the geometry of this call."
        )
    if plan.num_heads not in (1, q.shape[2]):
        raise ValueError(
            f"the plan tells {plan.num_heads} heads apart but q has {q.shape[2]}: "
            "give one map for all heads, or one for every head."
        )
