"""FlashInfer's block-sparse attention, for equal blocks and for blocks of varying size (arXiv:2501.01005).

Written from the package's documented interface and not run by the project yet, so ``auto`` passes it by.
"""

from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longtake.attention.backends.base import AttentionRequest, Backend, Limits, Reason, Verdict
from longtake.attention.backends.dense import natural
from longtake.attention.plan import BlockPlan

WORKSPACE_BYTES = 128 << 20


class Flashinfer(Backend):
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

    @classmethod
    def supports(cls, request: AttentionRequest) -> Verdict:
        reasons = super().supports(request).reasons
        size = request.plan.k_block if request.plan is not None else None
        if size is not None and request.num_keys % size:
            text = f"the {request.num_keys} keys must be a multiple of the block of {size}"
            reasons = (*reasons, Reason("feature", text, "Take 'flashinfer_variable'."))
        return Verdict(reasons)

    def _execute(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        wrapper = _prepared(self._wrapper, plan, (q.device, q.dtype, q.shape[2:], k.shape[2], scale))
        parts = [wrapper.run(*sample, return_lse=return_lse) for sample in zip(q, k, v, strict=True)]
        if not return_lse:
            return torch.stack(parts), None
        lse = torch.stack([lse.transpose(0, 1) for _, lse in parts])  # (queries, heads) each
        return torch.stack([out for out, _ in parts]), natural(lse)

    def _wrapper(self, plan: BlockPlan, key: tuple) -> Any:
        device, dtype, (num_heads, head_dim), num_kv_heads, scale = key
        wrapper = self._load().BlockSparseAttentionWrapper(_workspace(device))
        bsr = plan.to_bsr()
        wrapper.plan(
            bsr.indptr.to(device),
            bsr.indices.to(device),
            plan.num_queries,
            plan.num_keys,
            bsr.block_rows,
            bsr.block_columns,
            num_heads,
            num_kv_heads,
            head_dim,
            sm_scale=scale,
            q_data_type=dtype,
        )
        return wrapper


class FlashinferVariable(Backend):
    """Blocks of any sizes, a map for every head of keys."""

    name = "flashinfer_variable"
    package = Flashinfer.package
    module = Flashinfer.module
    install = Flashinfer.install
    limits = Limits(
        devices=("cuda",),
        min_capability=(8, 0),
        max_head_dim=256,
        plans="per_head",
        needs_plan=True,
        backward=False,
    )

    @classmethod
    def supports(cls, request: AttentionRequest) -> Verdict:
        reasons = super().supports(request).reasons
        if request.plan is not None and request.plan.num_heads > request.num_kv_heads:
            text = f"it takes a map for every head of keys ({request.num_kv_heads}), not of queries"
            reasons = (*reasons, Reason("feature", text))
        return Verdict(reasons)

    def _execute(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        wrapper = _prepared(self._wrapper, plan, (q.device, q.dtype, q.shape[2:], k.shape[2], scale))
        samples = zip(*(x.transpose(1, 2) for x in (q, k, v)), strict=True)  # (heads, tokens, head_dim) each
        parts = [wrapper.run(*sample, return_lse=return_lse) for sample in samples]
        if not return_lse:
            return torch.stack(parts).transpose(1, 2), None
        out = torch.stack([out for out, _ in parts]).transpose(1, 2)
        return out, natural(torch.stack([lse for _, lse in parts]))

    def _wrapper(self, plan: BlockPlan, key: tuple) -> Any:
        device, dtype, (num_heads, head_dim), num_kv_heads, scale = key
        wrapper = self._load().VariableBlockSparseAttentionWrapper(_workspace(device))
        sizes = [
            edges.reshape(-1, edges.shape[-1]).diff(dim=-1).expand(num_kv_heads, -1).contiguous().to(device)
            for edges in (plan.q_edges, plan.k_edges)
        ]
        mask = plan.block_mask.expand(num_kv_heads, -1, -1).contiguous().to(device)
        wrapper.plan(mask, *sizes, num_heads, num_kv_heads, head_dim, sm_scale=scale, q_data_type=dtype)
        return wrapper


@cache
def _workspace(device: torch.device) -> Tensor:
    """One for all calls on a device: they follow one another."""
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


_wrappers: WeakKeyDictionary[BlockPlan, dict[tuple, Any]] = WeakKeyDictionary()


def _prepared(make: Any, plan: BlockPlan, key: tuple) -> Any:
    """The wrapper that was planned for these, as long as the plan lives: planning costs more than a call."""
    wrappers = _wrappers.setdefault(plan, {})
    full_key = (make.__qualname__, *key)
    if full_key not in wrappers:
        wrappers[full_key] = make(plan, key)
    return wrappers[full_key]
