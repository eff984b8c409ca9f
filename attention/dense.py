"""The fastest exact dense attention for a device and dtype."""

from collections.abc import Callable

import torch
from torch import Tensor

from longtake.attention.sdpa import sdpa
from longtake.attention.zentorch import unavailable, zentorch

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
