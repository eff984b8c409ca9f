"""FlashInfer's block-sparse attention, for equal blocks and for blocks of varying size (arXiv:2501.01005).

The project has no machine to run it on, so ``auto`` does not take it.
"""

import math
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longtake.attention.backends.base import AttentionRequest, Limits, PlanBackend, Reason, Verdict
from longtake.attention.plan import BlockPlan

_WORKSPACE_BYTES = 128 << 20
_wrappers: WeakKeyDictionary[BlockPlan, dict[tuple, Any]] = WeakKeyDictionary()


class Flashinfer(PlanBackend):
    """Equal blocks of any size, one map for all heads."""

    name = "flashinfer"
    package = "flashinfer-python"
    module = "flashinfer"
    install = "pip install flashinfer-python (CUDA 12.9+, nvcc for its kernels)"
    limits = Limits(
        devices=("cuda",),
        min_capability=(7, 5),
        max_head_dim=256,
        plans="shared",
        needs_plan=True,
        varying_blocks=False,
        backward=False,
    )
    token_dim = 0  # of q, k, v and out of one sample; heads are the other one

    @classmethod
    def supports(cls, request: AttentionRequest) -> Verdict:
        reasons = super().supports(request).reasons
        size = request.plan.k_block if request.plan is not None else None
        if not cls.limits.varying_blocks and size is not None and request.num_keys % size:
            text = f"the {request.num_keys} keys must be a multiple of the block of {size}"
            reasons = (*reasons, Reason("feature", text, "Take 'flashinfer_variable'."))
        return Verdict(reasons)

    def _execute_plan(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        # Planning costs more than a call: a wrapper is kept as long as its plan lives.
        wrappers = _wrappers.setdefault(plan, {})
        key = (self.name, q.device, q.dtype, q.shape[2:], k.shape[2], scale)
        if key not in wrappers:
            wrappers[key] = self._wrapper(plan, q, k, scale)
        results = [
            wrappers[key].run(*(x.movedim(0, self.token_dim) for x in sample), return_lse=True)
            for sample in zip(q, k, v, strict=True)
        ]
        out = torch.stack([out.movedim(self.token_dim, 0) for out, _ in results])
        # Sums of (tokens, heads) or (heads, tokens), logarithms to base 2.
        lse = torch.stack([lse.movedim(self.token_dim, 1) for _, lse in results]) * math.log(2)
        return out, lse if return_lse else None

    def _wrapper(self, plan: BlockPlan, q: Tensor, k: Tensor, scale: float) -> Any:
        wrapper = self._load().BlockSparseAttentionWrapper(_workspace(q.device))
        ends = torch.cat([plan.counts.new_zeros(1), plan.counts[0].cumsum(0, dtype=torch.int32)])
        indices = plan.index[0][plan.index[0] >= 0]
        wrapper.plan(
            ends.to(q.device),
            indices.to(q.device),
            plan.num_queries,
            plan.num_keys,
            *plan.uniform_block_sizes,
            q.shape[2],
            k.shape[2],
            q.shape[3],
            sm_scale=scale,
            q_data_type=q.dtype,
        )
        return wrapper


class FlashinferVariable(Flashinfer):
    """Blocks of any sizes, a map for every head of keys."""

    name = "flashinfer_variable"
    limits = Limits(
        devices=("cuda",),
        min_capability=(8, 0),
        max_head_dim=256,
        plans="per_head",
        needs_plan=True,
        backward=False,
    )
    token_dim = 1

    @classmethod
    def supports(cls, request: AttentionRequest) -> Verdict:
        reasons = super().supports(request).reasons
        if request.plan is not None and request.plan.num_heads > request.num_kv_heads:
            text = f"it takes a map for every head of keys ({request.num_kv_heads}), not of queries"
            reasons = (*reasons, Reason("feature", text))
        return Verdict(reasons)

    def _wrapper(self, plan: BlockPlan, q: Tensor, k: Tensor, scale: float) -> Any:
        wrapper = self._load().VariableBlockSparseAttentionWrapper(_workspace(q.device))
        sizes = [
            edges.reshape(-1, edges.shape[-1]).diff(dim=-1).expand(k.shape[2], -1).contiguous().to(q.device)
            for edges in (plan.q_edges, plan.k_edges)
        ]
        mask = plan.block_mask.expand(k.shape[2], -1, -1).contiguous().to(q.device)
        wrapper.plan(mask, *sizes, q.shape[2], k.shape[2], q.shape[3], sm_scale=scale, q_data_type=q.dtype)
        return wrapper


@cache
def _workspace(device: torch.device) -> Tensor:
    """Memory shared by all calls on a device: they follow one another."""
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
