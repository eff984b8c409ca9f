"""Attention: dense and block-sparse, by the best backend of the machine or a named one, and sparse policies."""

from longtake.attention.backends import BACKENDS, AttentionCall, AttentionRequest, BackendUnavailable
from longtake.attention.backends.packages import fastest, zentorch
from longtake.attention.backends.pytorch import Attention, sdpa
from longtake.attention.dispatch import attention, explain, sparse_attention
from longtake.attention.geometry import AttentionGeometry, Segment
from longtake.attention.plan import BlockPlan
from longtake.attention.policies import SparsePolicy, make_attention_policy

__all__ = [
    "BACKENDS",
    "Attention",
    "AttentionCall",
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
    "sdpa",
    "sparse_attention",
    "zentorch",
]
