"""Attention backends: plain functions of (batch, tokens, heads, head_dim) tensors."""

from longtake.attention.dense import Attention, fastest
from longtake.attention.sdpa import sdpa
from longtake.attention.zentorch import zentorch

__all__ = ["Attention", "fastest", "sdpa", "zentorch"]
