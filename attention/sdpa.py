"""PyTorch's own fused attention: exact, on every device."""

import torch
from torch import Tensor


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
