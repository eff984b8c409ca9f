"""Attention: dense and block-sparse, by the best backend of the machine or by a named one, and what to leave out."""

from longtake.attention.backends import BACKENDS
from longtake.attention.backends.base import AttentionRequest, BackendUnavailable
from longtake.attention.backends.dense import Attention, fastest, merge_parts, sdpa, zentorch
from longtake.attention.dispatch import attention, explain, sparse_attention
from longtake.attention.plan import AttentionGeometry, BlockPlan, Segment
from longtake.attention.policies import SparsePolicy, make_attention_policy
from longtake.attention.policies.radial import radial_block_mask

__all__ = [
    "BACKENDS",
    "Attention",
    "AttentionGeometry",
    "AttentionRequest",
    "BackendUnavailable",
    "BlockPlan",
    "Segment",
    "SparsePolicy",
    "attention",
    "explain",
    "fastest",
    "make_attention_policy",
    "merge_parts",
    "radial_block_mask",
    "sdpa",
    "sparse_attention",
    "zentorch",
]
