"""Sparse attention policies, by the name that YAML and the command line use: one method, one dataclass, one file."""

from longtake.attention.policies.base import POLICIES, BlockPolicy, SparsePolicy, make_attention_policy

__all__ = ["POLICIES", "BlockPolicy", "SparsePolicy", "make_attention_policy"]
