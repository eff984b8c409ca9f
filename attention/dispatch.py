"""One call for every way to compute attention: names are followed to the letter, ``auto`` chooses and can say why."""

import logging
import math
import os
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from longtake.attention.backends import BACKENDS, find_backend
from longtake.attention.backends.base import AttentionRequest, BackendUnavailable, Reason, Verdict
from longtake.attention.backends.dense import attend, fastest, zentorch
from longtake.attention.plan import AttentionGeometry, BlockPlan
from longtake.configs.fields import choose

log = logging.getLogger(__name__)

MAX_ROWS = 64
MAX_SCORES = 1 << 24
"""Scores that a check may hold: fewer rows are compared where keys are many."""

# Largest difference, as a share of the largest value: rounding of the results and of the sums in each precision.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
TF32_TOLERANCE = 5e-3
# Approximate kernels, by direction and by size of the difference.
MIN_COSINE = 0.999
MAX_RELATIVE = 0.05

_seen: dict[tuple[str, AttentionRequest], str] = {}


def fault_of(name: str, request: AttentionRequest) -> str | None:
    """What was wrong with a backend for such a call; empty: nothing; None: not looked at yet."""
    return _seen.get((name, request.signature))


def check(
    name: str,
    request: AttentionRequest,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan | None,
    *,
    scale: float | None,
    out: Tensor,
    lse: Tensor | None,
    exact: bool,
) -> str:
    """Compare evenly spaced rows of a result with PyTorch's attention in float32 or wider, under the plan's mask.

    Args:
        name: The backend's.
        request: What the call asks.
        q: (batch, queries, heads, head_dim).
        k: (batch, keys, heads of keys, head_dim).
        v: As ``k``.
        plan: Which blocks are read; None: all.
        scale: What scores are multiplied by; None: head_dim ** -0.5.
        out: What the backend made of them.
        lse: Its log-sum-exp, if it was asked for.
        exact: Whether the backend means to be exact.

    Returns:
        What is wrong, in words; empty if nothing is. It is kept for calls like this one.
    """
    with torch.no_grad():
        rows = max(8, min(MAX_ROWS, MAX_SCORES // (q.shape[0] * q.shape[2] * k.shape[1])))
        queries = torch.linspace(0, q.shape[1] - 1, min(rows, q.shape[1]), device=q.device).round().long()
        mask = None if plan is None else plan.to(q.device).to_dense_mask(queries)[None]
        wide = torch.promote_types(q.dtype, torch.float32)
        expected, sums = attend(
            q[:, queries].to(wide), k.to(wide), v.to(wide), scale=scale, mask=mask, return_lse=lse is not None
        )
        if not bool(expected.isfinite().all()):
            return ""  # Numbers that no backend can do anything with say nothing about this one; look again next time.
        fault = _difference(out[:, queries].to(wide), expected, request, exact)
        if not fault and lse is not None:
            fault = _difference(lse[:, :, queries].to(wide), sums.to(wide), request, exact)
            fault = fault and f"log-sum-exp: {fault}"
    _seen[name, request.signature] = fault
    return fault


def _difference(found: Tensor, expected: Tensor, request: AttentionRequest, exact: bool) -> str:
    if not exact:
        cosine = float(torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0))
        relative = float((found - expected).abs().sum() / expected.abs().sum())
        is_near = cosine > MIN_COSINE and relative < MAX_RELATIVE
        return "" if is_near else f"cosine {cosine:.4f} and relative difference {relative:.3f}"
    tolerance = TOLERANCE[request.dtype]
    if request.device == "cuda" and request.dtype == torch.float32:
        tolerance = TF32_TOLERANCE
    largest = float((found - expected).abs().max())
    limit = tolerance * max(1.0, float(expected.abs().max()))
    return "" if largest <= limit and not math.isnan(largest) else f"difference {largest:.2g}, limit {limit:.2g}"


log = logging.getLogger(__name__)

BACKEND_VARIABLE = "LONGTAKE_ATTENTION_BACKEND"
"""Environment variable that takes the place of ``auto``; read at every call."""

UNVERIFIED_VARIABLE = "LONGTAKE_ATTENTION_UNVERIFIED"
"""Environment variable; 1: ``auto`` also takes exact backends that the project has not run on this kind of device."""

SPARSE_ARCHITECTURES = (9, 10, 11)
# Of a CPU, measured on two cores: what tells gathering and masking apart, so their ratios count and not their size.
DENSE_RATE = 1.5e11  # multiplications and additions per second
MASKED_COST = 3.2  # time under a mask over time without, mask made
SECONDS_PER_CALL = 5e-5  # of a group of rows, however small


@dataclass(frozen=True)
class Row:
    """What is to be said of one backend for one call.

    Attributes:
        name: Of the backend.
        verdict: What speaks against it, on this machine or for this call.
        exact: Whether it computes softmax attention up to rounding.
        is_verified: Whether the project has run it on this kind of device.
        is_chosen: Whether ``auto`` takes it.
        note: What else keeps ``auto`` from it.
    """

    name: str
    verdict: Verdict
    exact: bool
    is_verified: bool
    is_chosen: bool
    note: str


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan | None = None,
    *,
    backend: str = "auto",
    scale: float | None = None,
    return_lse: bool = False,
    allow_approx: bool = False,
    strict: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention, dense or over the blocks of a plan, by the best backend for this call on this machine.

    The plan is followed exactly by every backend; which one runs changes rounding and time, nothing else. The first
    result of a backend for each kind of call is compared with PyTorch's attention on some of its rows.

    Args:
        q: (batch, queries, heads, head_dim).
        k: (batch, keys, heads of keys, head_dim); the number of keys is free, their heads divide those of queries.
        v: As ``k``.
        plan: Which blocks are read, with one map for all heads, one for each, or one for each head of each sample
            (batch x heads, sample by sample); None: all.
        backend: ``auto``, or a name of ``BACKENDS``, which is then the one that runs, or the call fails.
        scale: What scores are multiplied by; None: head_dim ** -0.5.
        return_lse: Also return how much was summed.
        allow_approx: Quantised backends may be named.
        strict: ``auto`` must find a backend that saves the work the plan leaves out, or the call fails.

    Returns:
        (batch, queries, heads, head_dim) in the dtype of ``q``; with ``return_lse`` also the natural logarithm of the
        sum of exponentials, (batch, heads, queries), float32 or wider.

    Raises:
        ValueError: If the tensors, the plan or the name do not fit.
        BackendUnavailable: If the named backend cannot run this here or computes something wrong; or, under
            ``strict``, if none is left.
    """
    if plan is not None and plan.num_heads == q.shape[0] * q.shape[2] > q.shape[2]:
        return _sample_by_sample(
            q,
            k,
            v,
            plan,
            backend=backend,
            scale=scale,
            return_lse=return_lse,
            allow_approx=allow_approx,
            strict=strict,
        )
    request = AttentionRequest.of(q, k, v, plan, scale=scale, return_lse=return_lse)
    if plan is not None:
        plan.validate()
    backend = os.environ.get(BACKEND_VARIABLE, backend) if backend == "auto" else backend
    if backend != "auto":
        _refuse(backend, request, allow_approx)
        return _run(backend, request, q, k, v, plan, scale)
    for name in _usable(request, strict):
        try:
            return _run(name, request, q, k, v, plan, scale)
        except BackendUnavailable as error:
            log.warning("attention backend passed over: %s", error)
    raise _nothing_left(request, strict)


class Planner(Protocol):
    """What makes plans: as much of ``SparsePolicy`` as is needed here.

    Attributes:
        is_static: Whether plans follow from the geometry alone, so that all samples share one.
    """

    is_static: bool

    def plan(
        self,
        q: Tensor,
        k: Tensor,
        geometry: AttentionGeometry,
        *,
        v: Tensor | None = None,
        memory: MutableMapping[Any, Any] | None = None,
    ) -> BlockPlan | None:
        """The blocks to read for a call of one sample, or None for dense attention."""
        ...


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: AttentionGeometry,
    *,
    policy: Planner,
    memory: MutableMapping[Any, Any] | None = None,
    backend: str = "auto",
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the blocks that a policy picks, or dense attention where it declines.

    Args:
        q: (batch, queries, heads, head_dim), rotated.
        k: (batch, keys, heads of keys, head_dim), rotated.
        v: As ``k``.
        geometry: Which frames the queries and the keys are.
        policy: Picks the blocks, for each sample where it looks at the tokens.
        memory: What the policy keeps between the calls of a rollout; None: nothing.
        backend: As for ``attention``; a name is for plans, dense attention is ``auto``'s.
        options: The other options of ``attention``.

    Returns:
        As ``attention``.

    Raises:
        ValueError: If tokens and geometry do not fit, or as ``attention``.
        BackendUnavailable: As ``attention``.
    """
    if (q.shape[1], k.shape[1]) != (geometry.num_queries, geometry.num_keys):
        raise ValueError(
            f"q has {q.shape[1]} tokens and k {k.shape[1]} but the geometry speaks of {geometry.num_queries} and "
            f"{geometry.num_keys}: describe this call."
        )
    if q.shape[0] == 1 or policy.is_static:
        plan = policy.plan(q, k, geometry, v=v, memory=memory)
        return attention(q, k, v, plan, backend="auto" if plan is None else backend, **options)
    results = []
    for index, sample in enumerate(zip(q.split(1), k.split(1), v.split(1), strict=True)):
        own = None if memory is None else memory.setdefault(("sample", index), {})
        results.append(sparse_attention(*sample, geometry, policy=policy, memory=own, backend=backend, **options))
    if options.get("return_lse"):
        outs, sums = zip(*results, strict=True)
        return torch.cat(outs), torch.cat(sums)
    return torch.cat(results)


def explain(request: AttentionRequest, *, allow_approx: bool = False, strict: bool = False) -> tuple[Row, ...]:
    """What every backend says to a call, and which one ``auto`` takes; runs nothing.

    Args:
        request: The call.
        allow_approx: As for ``attention``.
        strict: As for ``attention``.

    Returns:
        One row for each entry of ``BACKENDS``, in that order.
    """
    chosen = next(iter(_usable(request, strict)), None)
    preferred = preferences(request)
    rows = []
    for name, cls in BACKENDS.items():
        verdict = _verdict(name, request)
        if not cls.exact and not allow_approx:
            verdict = Verdict((*verdict.reasons, _approximate(name)))
        is_verified = request.device in cls.verified_on
        note = "" if is_verified else f"not verified on {request.device}"
        if is_verified and verdict.ok and name not in preferred:
            note = "only when asked for by name"
        rows.append(Row(name, verdict, cls.exact, is_verified, name == chosen, note))
    return tuple(rows)


def _sample_by_sample(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, **options: object) -> Tensor:
    """A map for each head of each sample: the samples' heads stand side by side in one sample."""
    batch = q.shape[0]
    folded = (x.transpose(0, 1).flatten(1, 2)[None] for x in (q, k, v))
    result = attention(*folded, plan, **options)
    out, lse = result if options["return_lse"] else (result, None)
    out = out[0].unflatten(1, (batch, -1)).transpose(0, 1)
    return (out, lse[0].unflatten(0, (batch, -1))) if options["return_lse"] else out


def _run(
    name: str, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, scale: float | None
) -> Tensor | tuple[Tensor, Tensor]:
    result = find_backend(name).run(q, k, v, plan=plan, scale=scale, return_lse=request.return_lse)
    fault = fault_of(name, request)
    if fault is None and not torch.compiler.is_compiling():
        out, lse = result if request.return_lse else (result, None)
        fault = check(name, request, q, k, v, plan, scale=scale, out=out, lse=lse, exact=BACKENDS[name].exact)
    if fault:
        hint = "Report it with the versions of torch and of the backend, and take another one."
        raise BackendUnavailable(
            f"backend {name!r} computes something else than PyTorch's attention for this call ({fault}). {hint}",
            backend=name,
            code="version",
            hint=hint,
        )
    return result


def _verdict(name: str, request: AttentionRequest) -> Verdict:
    """What speaks against a backend: the machine first, then the call."""
    cls = BACKENDS[name]
    reasons = [*cls.available().reasons, *cls.supports(request).reasons]
    if request.device == "cuda" and not torch.cuda.is_available() and "cuda" in cls.limits.devices:
        reasons.insert(0, Reason("no_device", "this machine has no CUDA device that PyTorch can use"))
    return Verdict(tuple(reasons))


def _approximate(name: str) -> Reason:
    return Reason("feature", f"{name!r} is quantised, so approximate", "Pass allow_approx=True.")


def _refuse(name: str, request: AttentionRequest, allow_approx: bool) -> None:
    """Raise unless the named backend can take the call."""
    cls = choose(BACKENDS, name, what="attention backend")
    verdict = _verdict(name, request)
    if verdict.ok and not cls.exact and not allow_approx:
        verdict = Verdict((_approximate(name),))
    if verdict.ok:
        return
    others = [other for other, cls in BACKENDS.items() if cls.exact and other != name and _verdict(other, request).ok]
    hint = f" {verdict.hint}" if verdict.hint else ""
    raise BackendUnavailable(
        f"backend {name!r} cannot run this call: {verdict.text}.{hint} Usable now for this call: "
        f"{', '.join(others) or 'none'}.",
        backend=name,
        code=verdict.reasons[0].code,
        hint=verdict.hint,
    )


def _usable(request: AttentionRequest, strict: bool) -> Iterator[str]:
    """What ``auto`` may take for a call, the best first."""
    allows_unverified = os.environ.get(UNVERIFIED_VARIABLE, "") == "1"
    for name in _able(request, allows_unverified):
        if strict and request.plan is not None and not request.plan.is_full and name == "sdpa_masked":
            continue
        if not fault_of(name, request):
            yield name


@lru_cache(maxsize=4096)
def _able(request: AttentionRequest, allows_unverified: bool) -> tuple[str, ...]:
    names = []
    for name in preferences(request):
        is_allowed = allows_unverified or request.device in BACKENDS[name].verified_on
        if is_allowed and _verdict(name, request).ok:
            names.append(name)
    if names:
        _log_choice(replace(request.signature, batch=1), names[0])
    return tuple(names)


@lru_cache(maxsize=256)
def _log_choice(request: AttentionRequest, name: str) -> None:
    """Once for each kind of call."""
    kind = "dense" if request.plan is None else "a block plan"
    log.info(
        "attention: %s for %s, %d queries, %d keys, %s on %s",
        name,
        kind,
        request.num_queries,
        request.num_keys,
        str(request.dtype).removeprefix("torch."),
        request.device,
    )


def preferences(request: AttentionRequest) -> tuple[str, ...]:
    """Backends that ``auto`` may think of for a call, the fastest first, whether or not they can run it."""
    plan = request.plan
    if plan is None or plan.is_full:
        is_fastest = plan is None and fastest(torch.device(request.device), request.dtype) is zentorch
        return ("zentorch", "sdpa") if is_fastest else ("sdpa",)
    if request.device == "cuda":
        flashinfer = ("flashinfer", "flashinfer_variable")
        is_new = request.capability is not None and request.capability[0] in SPARSE_ARCHITECTURES
        return (*(("flash4",) if is_new else ()), *flashinfer, "flex", "gather_sdpa", "sdpa_masked")
    pairs = request.batch * request.num_heads * request.num_queries * request.num_keys
    dense = 4 * pairs * request.head_dim / DENSE_RATE
    num_calls = request.num_queries / plan.tile
    gathered = dense * plan.density / _tile_efficiency(plan.tile) + num_calls * SECONDS_PER_CALL
    pays = gathered <= dense * MASKED_COST + SECONDS_PER_CALL
    return ("gather_sdpa", "sdpa_masked") if pays else ("sdpa_masked", "gather_sdpa")


def _tile_efficiency(tile: float) -> float:
    """Share of the dense rate that gathered attention reaches on a CPU, by the queries computed together; measured."""
    return 0.36 if tile < 128 else 0.83 if tile < 768 else 0.93


def _nothing_left(request: AttentionRequest, strict: bool) -> BackendUnavailable:
    rows = explain(request, strict=strict)
    listed = "; ".join(f"{row.name}: {row.verdict.text or row.note or 'failed its check'}" for row in rows)
    hint = "Pass strict=False to compute every pair under a mask." if strict else "Take float32 on the CPU, or CUDA."
    return BackendUnavailable(
        f"no attention backend is left for this call ({listed}). {hint}", backend="auto", code="feature", hint=hint
    )
