"""One call for every way to compute attention: a named backend runs or the call fails, ``auto`` chooses."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from longtake.attention.backends import BACKENDS, AttentionCall, AttentionRequest, BackendUnavailable, find_backend
from longtake.attention.backends.base import Reason, Result, Verdict
from longtake.attention.backends.packages import fastest, zentorch
from longtake.attention.backends.pytorch import MAX_KEPT_MASK, attend
from longtake.attention.geometry import AttentionGeometry
from longtake.attention.plan import BlockPlan
from longtake.attention.policies.base import DensityMeter, Memory, SparsePolicy
from longtake.configs.fields import choose

log = logging.getLogger(__name__)

_SMALL_TILE = 64  # queries; gathering keys for fewer costs more than it saves where the mask is small too
_CHECKED_ROWS = 64
_MAX_SCORES = 1 << 24  # that a check may hold: fewer rows are compared where keys are many
# Largest difference, as a share of the largest value: rounding of the results and of the sums in each precision.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_TF32_TOLERANCE = 5e-3
# Approximate kernels, by direction and by size of the difference.
_MIN_COSINE = 0.999
_MAX_RELATIVE = 0.05

_faults: dict[tuple[str, AttentionRequest], str] = {}


@dataclass(frozen=True)
class Row:
    """The answer of one backend to one call."""

    name: str
    verdict: Verdict
    exact: bool
    is_chosen: bool  # whether ``auto`` takes it
    note: str  # a reason beside the verdict why ``auto`` does not take it


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention, dense or over the blocks of a plan, by the best backend for this call on this machine.

    Every backend follows the plan exactly; the choice changes rounding and time, nothing else. The first result of a
    backend for each kind of call is compared with PyTorch's attention on some of its rows.

    Args:
        q: (batch, queries, heads, head_dim).
        k: (batch, keys, heads of keys, head_dim); the number of keys is free, their heads divide those of queries.
        v: As ``k``.
        plan: Blocks that are read, with one map for all heads or one for each; None: all.
        backend: ``auto``, or a name of ``BACKENDS``, which is then the one that runs, or the call fails.
        scale: Factor of the scores; None: head_dim ** -0.5.
        return_lse: Also return the log-sum-exp of the scores.
        allow_approx: Quantised backends may be named.

    Returns:
        (batch, queries, heads, head_dim) in the dtype of ``q``; with ``return_lse`` also the natural logarithm of the
        sum of exponentials, (batch, heads, queries), float32 or wider.

    Raises:
        ValueError: If the tensors, the plan or the name do not fit.
        BackendUnavailable: If the named backend cannot run this here or computes something wrong, or none is left.
    """
    call = AttentionCall(q, k, v, plan, scale, return_lse)
    out, lse = _compute(call, backend=backend, allow_approx=allow_approx)
    return out if lse is None else (out, lse)


def _compute(call: AttentionCall, *, backend: str, allow_approx: bool = False) -> Result:
    request = AttentionRequest.of(call)
    if call.plan is not None:
        call.plan.validate()
    if backend != "auto":
        _refuse(backend, request, allow_approx)
        return _run(backend, request, call)
    for name in _usable(request):
        try:
            return _run(name, request, call)
        except BackendUnavailable as error:
            log.warning("attention backend passed over: %s", error)
    listed = "; ".join(f"{row.name}: {row.verdict.text or row.note or 'failed its check'}" for row in explain(request))
    hint = "Take float32 on the CPU, or CUDA."
    message = f"no attention backend is left for this call ({listed}). {hint}"
    raise BackendUnavailable(message, backend="auto", code="feature", hint=hint)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: AttentionGeometry,
    *,
    policy: SparsePolicy | DensityMeter,
    memory: Memory | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention over the blocks that a policy picks, or dense attention where it declines.

    Tensors, result and errors are those of ``attention``, with queries and keys rotated; and ``ValueError`` if tokens
    and geometry do not fit.

    Args:
        q: (batch, queries, heads, head_dim).
        k: (batch, keys, heads of keys, head_dim).
        v: As ``k``.
        geometry: Frames of the queries and of the keys.
        policy: Picks the blocks, for each sample where it looks at the tokens.
        memory: State of the policy between the calls of a rollout; None: it keeps nothing.
        backend: As for ``attention``; a name is for plans, dense attention is ``auto``'s.
    """
    if q.shape[0] == 1 or policy.is_static:
        plan = policy.plan(q, k, geometry, v=v, memory=memory)
        return _compute(AttentionCall(q, k, v, plan), backend="auto" if plan is None else backend)[0]
    results = []
    for index, sample in enumerate(zip(q.split(1), k.split(1), v.split(1), strict=True)):
        own = None if memory is None else memory.setdefault(("sample", index), {})
        results.append(sparse_attention(*sample, geometry, policy=policy, memory=own, backend=backend))
    return torch.cat(results)


def explain(request: AttentionRequest, *, allow_approx: bool = False) -> tuple[Row, ...]:
    """List the answer of every entry of ``BACKENDS`` to a call, and the one that ``auto`` takes; runs nothing."""
    chosen = next(iter(_usable(request)), None)
    preferred = preferences(request)
    rows = []
    for name, cls in BACKENDS.items():
        verdict = _verdict(name, request, allow_approx)
        note = ""
        if request.device not in cls.verified_on:
            note = f"not verified on {request.device}"
        elif verdict.ok and name not in preferred:
            note = "only when asked for by name"
        rows.append(Row(name, verdict, cls.exact, name == chosen, note))
    return tuple(rows)


def preferences(request: AttentionRequest) -> tuple[str, ...]:
    """List the backends that ``auto`` considers for a call, the fastest first, whether or not they can run it."""
    plan = request.plan
    if plan is None or plan.density == 1:
        is_fastest = plan is None and fastest(torch.device(request.device), request.dtype) is zentorch
        return ("zentorch", "sdpa") if is_fastest else ("sdpa",)
    # Gathering computes what the plan keeps and no more, but in a call for every group of rows.
    is_small = request.num_queries * request.num_keys * plan.num_heads <= MAX_KEPT_MASK and plan.tile < _SMALL_TILE
    return ("sdpa_masked", "gather_sdpa") if is_small else ("gather_sdpa", "sdpa_masked")


def _run(name: str, request: AttentionRequest, call: AttentionCall) -> Result:
    result = find_backend(name).run(call)
    fault = _faults.get((name, request.signature))
    if fault is None and not torch.compiler.is_compiling():
        fault = _check(name, request, call, result)
    if fault:
        hint = "Report it with the versions of torch and of the backend, and take another one."
        text = f"backend {name!r} computes something else than PyTorch's attention for this call ({fault}). {hint}"
        raise BackendUnavailable(text, backend=name, code="version", hint=hint)
    return result


def _verdict(name: str, request: AttentionRequest, allow_approx: bool = False) -> Verdict:
    """Reasons against a backend: the machine's first, then the call's."""
    cls = BACKENDS[name]
    reasons = [*cls.available().reasons, *cls.supports(request).reasons]
    if request.device == "cuda" and not torch.cuda.is_available() and "cuda" in cls.limits.devices:
        reasons.insert(0, Reason("this machine has no CUDA device that PyTorch can use", "no_device"))
    if not cls.exact and not allow_approx:
        reasons.append(Reason(f"{name!r} is quantised, so approximate", hint="Pass allow_approx=True."))
    return Verdict(tuple(reasons))


def _refuse(name: str, request: AttentionRequest, allow_approx: bool) -> None:
    choose(BACKENDS, name, what="attention backend")
    verdict = _verdict(name, request, allow_approx)
    if verdict.ok:
        return
    others = ", ".join(other for other in BACKENDS if other != name and _verdict(other, request).ok)
    hint = f" {verdict.hint}" if verdict.hint else ""
    text = (
        f"backend {name!r} cannot run this call: {verdict.text}.{hint} Usable now for this call: {others or 'none'}."
    )
    raise BackendUnavailable(text, backend=name, code=verdict.reasons[0].code, hint=verdict.hint)


def _usable(request: AttentionRequest) -> Iterator[str]:
    """Yield the backends that ``auto`` may take for a call, the best first."""
    return (name for name in _able(request) if not _faults.get((name, request.signature)))


@lru_cache(maxsize=4096)
def _able(request: AttentionRequest) -> tuple[str, ...]:
    verified = (name for name in preferences(request) if request.device in BACKENDS[name].verified_on)
    return tuple(name for name in verified if _verdict(name, request).ok)


def _check(name: str, request: AttentionRequest, call: AttentionCall, result: Result) -> str:
    """Compare evenly spaced rows of a result with PyTorch's attention in float32 or wider, under the plan's mask.

    The fault in words, empty if there is none, is kept for calls like this one.
    """
    q, k, v = call[:3]
    out, lse = result
    with torch.no_grad():
        rows = max(8, min(_CHECKED_ROWS, _MAX_SCORES // (q.shape[0] * q.shape[2] * k.shape[1])))
        queries = torch.linspace(0, q.shape[1] - 1, min(rows, q.shape[1]), device=q.device).round().long()
        mask = None if call.plan is None else call.plan.to(q.device).to_dense_mask(queries)[None]
        wide = torch.promote_types(q.dtype, torch.float32)
        expected, sums = attend(call._replace(q=q[:, queries].to(wide), k=k.to(wide), v=v.to(wide)), mask)
        if not bool(expected.isfinite().all()):
            return ""  # Such numbers say nothing about a backend; look again next time.
        fault = _difference(out[:, queries].to(wide), expected, request, BACKENDS[name].exact)
        if not fault and lse is not None and sums is not None:
            fault = _difference(lse[:, :, queries].to(wide), sums.to(wide), request, BACKENDS[name].exact)
            fault = fault and f"log-sum-exp: {fault}"
    _faults[name, request.signature] = fault
    dtype, kind = str(q.dtype).removeprefix("torch."), "dense" if call.plan is None else "a block plan"
    log.info(
        "attention: %s for %s, %d queries, %d keys, %s on %s", name, kind, q.shape[1], k.shape[1], dtype, q.device
    )
    return fault


def _difference(found: Tensor, expected: Tensor, request: AttentionRequest, exact: bool) -> str:
    if not exact:
        cosine = float(torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0))
        relative = float((found - expected).abs().sum() / expected.abs().sum())
        is_near = cosine > _MIN_COSINE and relative < _MAX_RELATIVE
        return "" if is_near else f"cosine {cosine:.4f} and relative difference {relative:.3f}"
    tolerance = _TOLERANCE[request.dtype]
    if request.device == "cuda" and request.dtype == torch.float32:
        tolerance = _TF32_TOLERANCE
    largest = float((found - expected).abs().max())
    limit = tolerance * max(1.0, float(expected.abs().max()))
    return "" if largest <= limit and not math.isnan(largest) else f"difference {largest:.2g}, limit {limit:.2g}"
