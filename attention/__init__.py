"""Attention backends: plain functions of (batch, tokens, heads, head_dim) tensors."""
