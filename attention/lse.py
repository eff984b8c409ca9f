"""Dense softmax attention that can also say how much it summed: the log-sum-exp of its scores."""

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

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
