"""PyTorch's own attention, dense and under a plan's mask, and AMD's for bfloat16 on the CPU."""

import math
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longtake.attention.backends.base import FLOATS, AttentionRequest, Backend, Limits, PlanBackend, Reason, Verdict
from longtake.attention.plan import BlockPlan

_MAX_SCORES = 1 << 24  # held at a time where attention is written out: 64 MiB in float32
_MAX_MASK = 1 << 26  # entries of the mask made at a time: 64 MiB
_FUSED = "_scaled_dot_product_flash_attention_for_cpu"  # behind the public function: it is private and may go
MAX_KEPT_MASK = 1 << 20
"""Entries of a mask that is kept as long as its plan lives: small calls would take as long to make it."""

Attention = Callable[..., Tensor]
"""(q, k, v, bias=None) -> out, all (batch, tokens, heads, head_dim) but the bias, (batch, heads, queries, keys)."""


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Dense softmax attention by PyTorch, on every device.

    Args:
        q: (batch, queries, heads, head_dim), rotated.
        k: (batch, keys, heads, head_dim), rotated.
        v: (batch, keys, heads, head_dim).
        bias: (batch or 1, heads or 1, queries or 1, keys), added to the scaled scores.

    Returns:
        (batch, queries, heads, head_dim), scores scaled by head_dim ** -0.5.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def zentorch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Dense softmax attention in bfloat16 on processors with AVX512-BF16, as exact as ``sdpa``; arguments as there.

    Raises:
        RuntimeError: If the backend cannot run here.

    Source: ZenDNN's plugin for PyTorch (AMD, MIT), operator ``zentorch_sdpa``, which takes no bias.
    """
    if bias is not None:
        return sdpa(q, k, v, bias)
    return _zentorch_operator()(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))[0].transpose(1, 2)


@cache
def _zentorch_operator() -> Callable:
    fault = zentorch_fault()
    if fault is not None:
        raise RuntimeError(f"{fault.text}: {fault.hint}")
    import zentorch  # noqa: F401  two seconds: only where it is used

    return torch.ops.zentorch.zentorch_sdpa.default


@cache
def zentorch_fault() -> Reason | None:
    """Look for a reason why ``zentorch`` cannot run here."""
    if not torch.cpu.get_capabilities().get("avx512_bf16", False):
        return Reason(
            "arch", "zentorch pays on processors with AVX512-BF16, and this one has not got it", "Use 'sdpa'."
        )
    if find_spec("zentorch") is None:
        return Reason("missing_package", "zentorch is not installed", "pip install 'longtake[zentorch]'.")
    ours, built_for = (".".join(text.split(".")[:2]) for text in (torch.__version__, version("zentorch")))
    if ours != built_for:
        text = f"zentorch {version('zentorch')} is built for torch {built_for}, not {ours}"
        return Reason("version", text, f"Install zentorch=={ours}.*.")
    return None


def fastest(device: torch.device, dtype: torch.dtype) -> Attention:
    """Choose the fastest exact dense attention for a device and dtype; all give the same result within rounding."""
    has_matrix_unit = torch.cpu.get_capabilities().get("amx_bf16", False)
    if device.type == "cpu" and dtype == torch.bfloat16 and not has_matrix_unit and zentorch_fault() is None:
        return zentorch
    return sdpa


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
        scale: Factor of the scores; None: head_dim ** -0.5.
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
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if q.device.type != "cpu" or not hasattr(torch.ops.aten, _FUSED) or needs_grad:
        out, lse = _written_out(q, k, v, scale, mask)
    else:
        fused = getattr(torch.ops.aten, _FUSED)
        bias = None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
        out, lse = fused(q, k, v, attn_mask=bias, scale=scale)
    return out.transpose(1, 2), lse


def _written_out(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(batch, heads, tokens, head_dim) attention, some queries at a time."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(wide).repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    rows = max(1, _MAX_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    parts = []
    for start in range(0, q.shape[2], rows):
        scores = q[:, :, start : start + rows].to(wide) @ k.transpose(-1, -2) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, start : start + rows], -math.inf)
        lse = scores.logsumexp(-1)
        parts.append(((scores - lse[..., None]).exp() @ v, lse))
    out, lse = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    return out.to(q.dtype), lse


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
    """AMD's fused attention in bfloat16 on the CPU."""

    name = "zentorch"
    limits = Limits(devices=("cpu",), dtypes=(torch.bfloat16,), lse=False, grouped=False, backward=False)
    verified_on = frozenset({"cpu"})

    @classmethod
    def available(cls) -> Verdict:
        fault = zentorch_fault()
        return Verdict() if fault is None else Verdict((fault,))

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


class SdpaMasked(PlanBackend):
    """PyTorch's attention under the plan's mask, token by token: all pairs are computed, slower than dense."""

    name = "sdpa_masked"
    limits = Limits(devices=("cpu", "cuda", "mps", "xpu"), dtypes=FLOATS, plans="per_head", needs_plan=True)
    verified_on = frozenset({"cpu", "cuda"})

    def _execute_plan(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        outs, sums, start = [], [], 0
        for mask in _masks(plan, q.device):
            rows = slice(start, start + mask.shape[2])
            out, lse = attend(q[:, rows], k, v, scale=scale, mask=mask, return_lse=return_lse)
            outs.append(out)
            if lse is not None:
                sums.append(lse)
            start = rows.stop
        if len(outs) == 1:
            return outs[0], sums[0] if sums else None
        return torch.cat(outs, dim=1), torch.cat(sums, dim=2) if sums else None


_kept: WeakKeyDictionary[BlockPlan, Tensor] = WeakKeyDictionary()


def _masks(plan: BlockPlan, device: torch.device) -> Iterator[Tensor]:
    """Yield (1, 1 or heads, some queries, keys), bool, for all queries in order."""
    if plan in _kept and _kept[plan].device == device:
        yield _kept[plan]
        return
    per_query = plan.num_heads * plan.num_keys
    moved = plan.to(device)
    if per_query * plan.num_queries <= MAX_KEPT_MASK:
        with torch.inference_mode(False):  # a later call may need gradients
            _kept[plan] = moved.to_dense_mask()[None].clone()
        yield _kept[plan]
        return
    for queries in torch.arange(plan.num_queries, device=device).split(max(1, _MAX_MASK // per_query)):
        yield moved.to_dense_mask(queries)[None]
