"""AMD's fused attention for bfloat16 on processors with AVX512-BF16, where PyTorch's own is no faster than float32."""

from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor

from longtake.attention.sdpa import sdpa


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
