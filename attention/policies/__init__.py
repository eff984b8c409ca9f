"""Sparse attention policies: one method, one dataclass, one file."""

from longtake.attention.policies.base import BlockPolicy, Memory, SparsePolicy, StaticPolicy
from longtake.attention.policies.registry import POLICIES, make_attention_policy

__all__ = ["POLICIES", "BlockPolicy", "Memory", "SparsePolicy", "StaticPolicy", "make_attention_policy"]
