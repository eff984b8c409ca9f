"""What every backend is: limits as data, verdicts as pure functions of a request, and one way to run."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import ClassVar, Literal, NamedTuple

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


Plans = Literal["none", "shared", "per_head"]
HALF = (torch.float16, torch.bfloat16)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a backend can take.

    Attributes:
        devices: Kinds of device.
        dtypes: Of queries, keys and values.
        min_capability: Lowest compute capability, on CUDA devices.
        max_head_dim: Largest head.
        head_dim_step: Heads must be a multiple of it.
        plans: No plans, plans in which all heads share one map, or any.
        needs_plan: Whether it is only for plans.
        varying_blocks: Whether blocks may be of several sizes.
        lse: Whether it gives the log-sum-exp.
        grouped: Whether there may be fewer heads of keys than of queries.
        backward: Whether gradients flow.
    """

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = HALF
    min_capability: tuple[int, int] = (0, 0)
    max_head_dim: int | None = None
    head_dim_step: int = 1
    plans: Plans = "none"
    needs_plan: bool = False
    varying_blocks: bool = True
    lse: bool = True
    grouped: bool = True
    backward: bool = True


class Backend(ABC):
    """One way to compute attention.

    Attributes:
        name: As in YAML and on the command line.
        limits: What it takes.
        exact: Whether it computes softmax attention up to rounding; quantised kernels do not.
        verified_on: Kinds of device where the project has run it against the reference; ``auto`` takes no other.
        package: Distribution it needs beyond PyTorch; None: nothing.
        module: Module of that distribution that is looked for without importing it.
        install: How to install it.
    """

    name: ClassVar[str]
    limits: ClassVar[Limits]
    exact: ClassVar[bool] = True
    verified_on: ClassVar[frozenset[str]] = frozenset()
    package: ClassVar[str | None] = None
    module: ClassVar[str | None] = None
    install: ClassVar[str] = ""

    @classmethod
    def available(cls) -> Verdict:
        """Whether this machine has what it needs; imports nothing and touches no device."""
        return Verdict() if cls.package is None else _installed(cls.package, cls.module, cls.install)

    @classmethod
    def supports(cls, request: AttentionRequest) -> Verdict:
        """Whether it could take a call where it is available: a pure function of the request."""
        return Verdict((*_device_reasons(cls.limits, request), *_feature_reasons(cls.limits, request)))

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        plan: BlockPlan | None = None,
        scale: float | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute attention; ``supports`` and ``BlockPlan.validate`` have been asked.

        Args:
            q: (batch, queries, heads, head_dim).
            k: (batch, keys, heads of keys, head_dim).
            v: As ``k``.
            plan: Which blocks are read; None: all.
            scale: What scores are multiplied by; None: head_dim ** -0.5.
            return_lse: Whether the log-sum-exp is returned too.

        Returns:
            (batch, queries, heads, head_dim) in the dtype of ``q``; and, if asked for, the natural logarithm of the
            sum of exponentials, (batch, heads, queries), float32 or wider.

        Raises:
            BackendUnavailable: If its package turns out not to load.
        """
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if plan is None or (plan.q_perm is None and plan.k_perm is None):
            out, lse = self._execute(q, k, v, plan, scale, return_lse)
        else:
            out, lse = self._in_order(q, k, v, plan, scale, return_lse)
        return (out, lse) if return_lse else out

    @abstractmethod
    def _execute(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention over tokens that stand in the plan's order."""

    def _in_order(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Put tokens into the plan's order, and results back into theirs."""
        if plan.k_perm is not None:
            if plan.k_perm.shape[0] > k.shape[2]:
                k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
            k, v = (x.gather(1, _places(plan.k_perm, x)) for x in (k, v))
        if plan.q_perm is None:
            return self._execute(q, k, v, plan.without_order(), scale, return_lse)
        places = _places(plan.q_perm, q)
        out, lse = self._execute(q.gather(1, places), k, v, plan.without_order(), scale, return_lse)
        out = torch.empty_like(out).scatter_(1, places, out)
        if lse is not None:
            lse = torch.empty_like(lse).scatter_(
                2, plan.q_perm.to(lse.device).expand(q.shape[2], -1).expand_as(lse), lse
            )
        return out, lse

    @classmethod
    def _load(cls, module: str | None = None) -> ModuleType:
        """Import its package, at the first run.

        Raises:
            BackendUnavailable: If that fails, with what the package said.
        """
        module = module or cls.module
        try:
            return import_module(module)
        except (ImportError, OSError, RuntimeError) as error:
            is_missing = isinstance(error, ModuleNotFoundError)
            hint = f"Install with: {cls.install}." if is_missing else f"Reinstall it for torch {torch.__version__}."
            raise BackendUnavailable(
                f"backend {cls.name!r} is not usable: importing {module!r} failed: {error}. {hint}",
                backend=cls.name,
                code="missing_package" if is_missing else "version",
                hint=hint,
            ) from error


@cache
def _installed(package: str, module: str | None, install: str) -> Verdict:
    """Whether a distribution is there, by its metadata or, for builds without any, by its module."""
    try:
        version(package)
    except PackageNotFoundError:
        if module is None or "." in module or find_spec(module) is None:
            hint = f"Install with: {install}."
            return Verdict((Reason("missing_package", f"package {package!r} is not installed", hint),))
    return Verdict()


def _device_reasons(limits: Limits, request: AttentionRequest) -> list[Reason]:
    reasons = []
    if request.device not in limits.devices:
        reasons.append(
            Reason("no_device", f"it has no kernels for {request.device}, only for {', '.join(limits.devices)}")
        )
    elif request.capability is not None and request.capability < limits.min_capability:
        has, needs = (".".join(map(str, capability)) for capability in (request.capability, limits.min_capability))
        reasons.append(Reason("arch", f"it needs compute capability {needs} or more and this device has {has}"))
    if request.dtype not in limits.dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in limits.dtypes)
        has = str(request.dtype).removeprefix("torch.")
        reasons.append(
            Reason("dtype", f"it takes {names}, not {has}", f"Convert q, k and v to {names.split(', ')[-1]}.")
        )
    most, step = limits.max_head_dim, limits.head_dim_step
    if (most is not None and request.head_dim > most) or request.head_dim % step:
        limit = f"head_dim up to {most}" if most is not None else "head_dim"
        reasons.append(Reason("head_dim", f"it takes {limit} in steps of {step}, not {request.head_dim}"))
    return reasons


def _feature_reasons(limits: Limits, request: AttentionRequest) -> list[Reason]:
    plan = request.plan
    texts = []
    if plan is not None and limits.plans == "none":
        texts.append("it has no block sparsity")
    elif plan is not None and plan.num_heads > 1 and limits.plans == "shared":
        texts.append(f"all heads must share one map, and the plan tells {plan.num_heads} apart")
    if plan is not None and not limits.varying_blocks and None in (plan.q_block, plan.k_block):
        texts.append("blocks must be of one size, and the plan's vary")
    if plan is None and limits.needs_plan:
        texts.append("it is only for block plans, and there is none")
    if request.return_lse and not limits.lse:
        texts.append("it does not return the log-sum-exp")
    if request.num_heads != request.num_kv_heads and not limits.grouped:
        texts.append(f"keys must have as many heads as queries, not {request.num_kv_heads} for {request.num_heads}")
    if request.needs_grad and not limits.backward:
        texts.append("it has no gradients")
    return [Reason("feature", text) for text in texts]


def _places(order: Tensor, x: Tensor) -> Tensor:
    """An order per head as an index into (batch, tokens, heads, head_dim)."""
    order = order.to(x.device).expand(x.shape[2], -1).transpose(0, 1)
    return order[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[3])
