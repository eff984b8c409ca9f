"""Which backends were seen to compute the right thing: some rows of a real call, against PyTorch's attention."""

import logging
import math

import torch
from torch import Tensor

from longtake.attention.lse import attend
from longtake.attention.plan import BlockPlan
from longtake.attention.requests import AttentionRequest

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


def forget() -> None:
    """Trust nothing that was seen."""
    _seen.clear()


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
