"""PyTorch's own fused attention: exact, on every device."""

import torch
from torch import Tensor


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense softmax attention.

    Args:
        q: (batch, queries, heads, head_dim), rotated.
        k: (batch, keys, heads, head_dim), rotated.
        v: (batch, keys, heads, head_dim).

    Returns:
        (batch, queries, heads, head_dim), scores scaled by head_dim ** -0.5.
    """
    out = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)
