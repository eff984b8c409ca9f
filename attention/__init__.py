"""Attention: dense and block-sparse, by the best backend of the machine or by a named one, and what to leave out."""

from longtake.attention.dense import Attention, fastest
from longtake.attention.dispatch import attention, explain, sparse_attention
from longtake.attention.executors import EXECUTORS
from longtake.attention.merge import merge_parts
from longtake.attention.plan import AttentionGeometry, BlockPlan, Segment
from longtake.attention.policies import SparsePolicy, make_attention_policy
from longtake.attention.radial_mask import radial_block_mask
from longtake.attention.requests import AttentionRequest, BackendUnavailable
from longtake.attention.sdpa import sdpa
from longtake.attention.zentorch import zentorch

__all__ = [
    "EXECUTORS",
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
