"""Attention: dense and block-sparse, by the best backend of the machine or a named one, and sparse policies."""

from longtake.attention.backends import BACKENDS, AttentionRequest, BackendUnavailable
from longtake.attention.backends.dense import Attention, fastest, sdpa, zentorch
from longtake.attention.dispatch import attention, explain, sparse_attention
from longtake.attention.geometry import AttentionGeometry, Segment
from longtake.attention.plan import BlockPlan
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
    "radial_block_mask",
    "sdpa",
    "sparse_attention",
    "zentorch",
]
