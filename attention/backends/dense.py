"""Dense attention: PyTorch's own, and AMD's for bfloat16 on the CPU."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longtake.attention.backends.base import FLOATS, AttentionRequest, Backend, Limits, Reason, Verdict
from longtake.attention.plan import BlockPlan


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Dense softmax attention.

    Args:
        q: (batch, queries, heads, head_dim), rotated.
        k: (batch, keys, heads, head_dim), rotated.
        v: (batch, keys, heads, head_dim).
        bias: (batch or 1, heads or 1, queries or 1, keys), added to the scaled scores.

    Returns:
        (batch, queries, heads, head_dim), scores scaled by head_dim ** -0.5.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


@cache
def unavailable() -> str | None:
    """Why this backend cannot run here, with the remedy, or None if it can."""
    if not torch.cpu.get_capabilities().get("avx512_bf16", False):
        return "zentorch pays on processors with AVX512-BF16, and this one has not got it: use sdpa"
    if find_spec("zentorch") is None:
        return "zentorch is not installed: pip install 'longtake[zentorch]'"
    ours, built_for = (".".join(text.split(".")[:2]) for text in (torch.__version__, version("zentorch")))
    if ours != built_for:
        return f"zentorch {version('zentorch')} is built for torch {built_for}, not {ours}: install zentorch=={ours}.*"
    return None


def zentorch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Dense softmax attention in bfloat16: scores and sums in float32, as exact as ``sdpa``.

    Args:
        q: (batch, queries, heads, head_dim), rotated, bfloat16 on the CPU.
        k: (batch, keys, heads, head_dim), rotated.
        v: (batch, keys, heads, head_dim).
        bias: (batch or 1, heads or 1, queries or 1, keys), added to the scaled scores; ``sdpa`` takes these calls.

    Returns:
        (batch, queries, heads, head_dim), scores scaled by head_dim ** -0.5.

    Raises:
        RuntimeError: If the backend cannot run here.

    Source: ZenDNN's plugin for PyTorch (AMD, MIT), operator ``zentorch_sdpa``.
    """
    if bias is not None:
        return sdpa(q, k, v, bias)
    return _operator()(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))[0].transpose(1, 2)


@cache
def _operator():
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    import zentorch  # noqa: F401  two seconds: only where it is used

    return torch.ops.zentorch.zentorch_sdpa.default


MAX_SCORES = 1 << 24
"""Scores held at a time where attention is written out, 64 MiB in float32."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """PyTorch's own attention, with the log-sum-exp of the scores where it is asked for.

    On the CPU the fused kernel gives both. On other devices, and where gradients are needed, PyTorch has no public
    function for it, and the attention is written out, exact but slower.

    Args:
        q: (batch, queries, heads, head_dim).
        k: (batch, keys, heads of keys, head_dim); the heads of keys divide those of queries.
        v: As ``k``.
        scale: What scores are multiplied by; None: head_dim ** -0.5.
        mask: (1 or batch, 1 or heads, queries, keys), bool: True is read.
        return_lse: Whether the second result is wanted.

    Returns:
        (batch, queries, heads, head_dim) in the dtype of ``q``; and (batch, heads, queries), float32, or float64 for
        float64 queries; None if not asked for.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not return_lse:
        is_grouped = q.shape[1] != k.shape[1]
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=is_grouped)
        return out.transpose(1, 2), None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    fused = _fused(q.device)
    if fused is None or needs_grad:
        out, lse = _written_out(q, k, v, scale, mask)
    else:
        bias = None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
        out, lse = fused(q, k, v, attn_mask=bias, scale=scale)
    return out.transpose(1, 2), lse


def natural(lse: Tensor) -> Tensor:
    """The natural logarithm of a sum from its base-2 logarithm, which FlashInfer and kernels in Triton give."""
    return lse * math.log(2)


def _fused(device: torch.device):
    """PyTorch's kernel behind the public function, which is private and may go; None if it has."""
    name = "_scaled_dot_product_flash_attention_for_cpu"
    return getattr(torch.ops.aten, name) if device.type == "cpu" and hasattr(torch.ops.aten, name) else None


def _written_out(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(batch, heads, tokens, head_dim) attention, some queries at a time."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(wide).repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    rows = max(1, MAX_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    parts = []
    for start in range(0, q.shape[2], rows):
        scores = q[:, :, start : start + rows].to(wide) @ k.transpose(-1, -2) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, start : start + rows], -math.inf)
        lse = scores.logsumexp(-1)
        parts.append(((scores - lse[..., None]).exp() @ v, lse))
    out, lse = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    return out.to(q.dtype), lse


def merge_parts(
    parts: Sequence[tuple[Tensor, Tensor]], log_weights: Sequence[float | Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Join parts that the same queries read separately.

    A key that stands for n keys, as after merging or compression, counts n times with the log-weight log(n).

    Args:
        parts: For each set of keys the result, (batch, queries, heads, head_dim), and the log-sum-exp of its scores,
            natural logarithm, (batch, heads, queries); -inf where a query read nothing.
        log_weights: Added to all scores of a part: numbers, or tensors that broadcast to the log-sum-exp.

    Returns:
        The joint result in the dtype of the first part, 0 where nothing was read, and its log-sum-exp.

    Raises:
        ValueError: If there are no parts, or not as many weights.
    """
    if not parts:
        raise ValueError("parts is empty: give at least one.")
    if log_weights is not None and len(log_weights) != len(parts):
        raise ValueError(f"{len(log_weights)} log_weights for {len(parts)} parts: give one for each, 0 to leave it.")
    sums = [lse for _, lse in parts]
    if log_weights is not None:
        sums = [lse + weight for lse, weight in zip(sums, log_weights, strict=True)]
    stacked = torch.stack(sums)
    total = stacked.logsumexp(0)
    # Where nothing was read at all the difference of two infinities is not a number; the share is none.
    shares = (stacked - total).exp().nan_to_num(0.0)
    wide = torch.promote_types(parts[0][0].dtype, torch.float32)
    joint = sum(out.to(wide) * share.transpose(1, 2)[..., None] for (out, _), share in zip(parts, shares, strict=True))
    return joint.to(parts[0][0].dtype), total


Attention = Callable[..., Tensor]
"""(q, k, v, bias=None) -> out, all (batch, tokens, heads, head_dim) but the bias, (batch, heads, queries, keys)."""


def fastest(device: torch.device, dtype: torch.dtype) -> Attention:
    """Choose among the backends that give the same result within rounding.

    Args:
        device: Where queries, keys and values are.
        dtype: Theirs.

    Returns:
        A function of (batch, tokens, heads, head_dim) queries, keys and values.
    """
    has_matrix_unit = torch.cpu.get_capabilities().get("amx_bf16", False)
    if device.type == "cpu" and dtype == torch.bfloat16 and not has_matrix_unit and unavailable() is None:
        return zentorch
    return sdpa


class Sdpa(Backend):
    """PyTorch's fused attention, on every device; it takes plans that leave nothing out."""

    name = "sdpa"
    limits = Limits(devices=("cpu", "cuda", "mps", "xpu"), dtypes=FLOATS, plans="per_head")
    verified_on = frozenset({"cpu", "cuda"})

    @classmethod
    def supports(cls, request: AttentionRequest) -> Verdict:
        reasons = super().supports(request).reasons
        if request.plan is not None and not request.plan.is_full:
            text = f"it computes every pair, and the plan keeps {request.plan.density:.0%} of them"
            reasons = (*reasons, Reason("feature", text, "Take 'sdpa_masked' for PyTorch's attention with a mask."))
        return Verdict(reasons)

    def _execute(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        return attend(q, k, v, scale=scale, return_lse=return_lse)


class Zentorch(Backend):
    """AMD's fused attention in bfloat16, see ``longtake.attention.backends.dense``."""

    name = "zentorch"
    limits = Limits(devices=("cpu",), dtypes=Sdpa.limits.dtypes[-1:], lse=False, grouped=False, backward=False)
    verified_on = frozenset({"cpu"})

    @classmethod
    def available(cls) -> Verdict:
        reason = unavailable()
        if reason is None:
            return Verdict()
        text, _, remedy = reason.partition(": ")
        code = "arch" if "AVX512" in text else "missing_package" if "not installed" in text else "version"
        return Verdict((Reason(code, text, f"{remedy[:1].upper()}{remedy[1:]}."),))

    @classmethod
    def supports(cls, request: AttentionRequest) -> Verdict:
        reasons = super().supports(request).reasons
        if request.has_scale:
            reasons = (*reasons, Reason("feature", "it scales scores by head_dim ** -0.5 only"))
        return Verdict(reasons)

    def _execute(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        return zentorch(q, k, v), None


MAX_MASK = 1 << 26
"""Entries of the mask made at a time, 64 MiB."""

MAX_KEPT = 1 << 20
"""Entries of a mask that is kept as long as its plan lives: small calls would take as long to make it."""

_kept: WeakKeyDictionary[BlockPlan, Tensor] = WeakKeyDictionary()


class SdpaMasked(Backend):
    """Every pair is computed and those that the plan leaves out are dropped."""

    name = "sdpa_masked"
    limits = Limits(devices=("cpu", "cuda", "mps", "xpu"), dtypes=FLOATS, plans="per_head", needs_plan=True)
    verified_on = frozenset({"cpu", "cuda"})

    def _execute(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        parts, start = [], 0
        for mask in _masks(plan, q.device):
            rows = slice(start, start + mask.shape[2])
            parts.append(attend(q[:, rows], k, v, scale=scale, mask=mask, return_lse=return_lse))
            start = rows.stop
        if len(parts) == 1:
            return parts[0]
        out = torch.cat([part for part, _ in parts], dim=1)
        return out, torch.cat([lse for _, lse in parts], dim=2) if return_lse else None


def _masks(plan: BlockPlan, device: torch.device) -> Iterator[Tensor]:
    """(1, 1 or heads, some queries, keys), bool, for all queries in order."""
    if plan in _kept and _kept[plan].device == device:
        yield _kept[plan]
        return
    per_query = plan.num_heads * plan.num_keys
    moved = plan.to(device)
    if per_query * plan.num_queries <= MAX_KEPT:
        with torch.inference_mode(False):  # a later call may need gradients
            _kept[plan] = moved.to_dense_mask()[None].clone()
        yield _kept[plan]
        return
    for queries in torch.arange(plan.num_queries, device=device).split(max(1, MAX_MASK // per_query)):
        yield moved.to_dense_mask(queries)[None]
