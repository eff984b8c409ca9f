"""Attention backends: plain functions of (batch, tokens, heads, head_dim) tensors."""

from longtake.attention.sdpa import sdpa

__all__ = ["sdpa"]
