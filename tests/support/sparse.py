"""Calls of sparse attention for tests: random tokens of a geometry, and settings without a dense beginning."""

from dataclasses import replace

import torch

EAGER = {"dense_blocks": 0, "dense_layers": 0, "dense_steps": 0}


def tokens(geometry, *, batch=1, heads=4, key_heads=2, dtype=torch.float32, seed=0):
    """Queries, keys and values, (batch, tokens, heads, 16)."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, geometry.num_queries, heads, 16, generator=generator)
    k, v = (torch.randn(batch, geometry.num_keys, key_heads, 16, generator=generator) for _ in "kv")
    return q.to(dtype), k.to(dtype), v.to(dtype)


def with_role(geometry, frame, role):
    segments = tuple(replace(s, role=role) if s.frame == frame else s for s in geometry.segments)
    return replace(geometry, segments=segments)
