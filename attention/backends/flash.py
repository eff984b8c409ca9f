"""The flash-attn family: dense kernels of versions 2 and 3, and block-sparse ones of version 4.

Written from the packages' documented interfaces and not run by the project yet, so ``auto`` passes them by.
"""

from typing import Any

import torch
from torch import Tensor

from longtake.attention.backends.base import AttentionRequest, Backend, Limits, Reason, Verdict
from longtake.attention.plan import BlockPlan

BLOCK = 128
SPARSE_ARCHITECTURES = (9, 10, 11)


class Flash(Backend):
    """flash-attn 2 (Dao, arXiv:2307.08691), dense."""

    name = "flash"
    package = "flash-attn"
    module = "flash_attn"
    install = "pip install flash-attn --no-build-isolation (built from source: needs nvcc)"
    limits = Limits(devices=("cuda",), min_capability=(8, 0), max_head_dim=256)

    def _execute(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        result = self._load().flash_attn_func(q, k, v, softmax_scale=scale, return_attn_probs=return_lse)
        return _pair(result, return_lse)


class Flash3(Backend):
    """flash-attn 3 for Hopper (Shah et al., arXiv:2407.08608), dense."""

    name = "flash3"
    package = "flash-attn-3"
    module = "flash_attn_interface"
    install = "pip install flash-attn-3 --index-url https://download.pytorch.org/whl/cu130"
    limits = Limits(devices=("cuda",), min_capability=(8, 0), max_head_dim=256, head_dim_step=8)

    def _execute(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        kernel = self._load().flash_attn_func
        # Older builds return the log-sum-exp always and know no such argument.
        result = kernel(q, k, v, softmax_scale=scale, **({"return_attn_probs": True} if return_lse else {}))
        return _pair(result, return_lse)


class Flash4(Backend):
    """flash-attn 4, dense, or with lists of full blocks of 128 on Hopper and Blackwell."""

    name = "flash4"
    package = "flash-attn-4"
    module = "flash_attn.cute"
    install = "pip install --pre flash-attn-4"
    limits = Limits(
        devices=("cuda",),
        min_capability=(8, 0),
        max_head_dim=128,
        head_dim_step=8,
        plans="per_head",
        varying_blocks=False,
    )

    @classmethod
    def supports(cls, request: AttentionRequest) -> Verdict:
        reasons = list(super().supports(request).reasons)
        plan = request.plan
        if plan is not None:
            if request.capability is not None and request.capability[0] not in SPARSE_ARCHITECTURES:
                has = "".join(map(str, request.capability))
                reasons.append(Reason("arch", f"on sm_{has} it has no block sparsity: that needs 9.x, 10.x or 11.x"))
            if {plan.q_block, plan.k_block} != {BLOCK}:
                sizes = f"{plan.q_block} x {plan.k_block}"
                reasons.append(Reason("feature", f"blocks must be {BLOCK} x {BLOCK}, not {sizes} (None: varying)"))
        return Verdict(tuple(reasons))

    def _execute(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        kernel = self._load().flash_attn_func
        sparse = {} if plan is None else {"block_sparse_tensors": self._lists(plan, q.device)}
        return _pair(kernel(q, k, v, softmax_scale=scale, return_lse=return_lse, **sparse), return_lse)

    def _lists(self, plan: BlockPlan, device: torch.device) -> Any:
        """Every kept block is read in full: no block is left to a mask."""
        counts, index = plan.counts[None].to(device), plan.index[None].clamp(min=0).to(device)
        return self._load("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch(
            mask_block_cnt=torch.zeros_like(counts),
            mask_block_idx=torch.zeros_like(index),
            full_block_cnt=counts.contiguous(),
            full_block_idx=index.contiguous(),
            block_size=(BLOCK, BLOCK),
        )


def _pair(result: Tensor | tuple[Tensor, ...], return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """The result, and (batch, heads, queries) of natural logarithms where they were asked for."""
    out, *rest = (result,) if isinstance(result, Tensor) else result
    return out, rest[0] if return_lse else None


class Xformers(Backend):
    """Whichever of its kernels fits: cutlass, flash-attn 2 or 3."""

    name = "xformers"
    package = "xformers"
    module = "xformers"
    install = "pip install 'xformers>=0.0.35' (torch 2.10 or newer, CUDA)"
    limits = Limits(
        devices=("cuda",),
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
        min_capability=(5, 0),
        max_head_dim=256,
        head_dim_step=8,
        grouped=False,
    )

    def _execute(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        fmha = self._load("xformers.ops.fmha")
        if not return_lse:
            return fmha.memory_efficient_attention(q, k, v, scale=scale), None
        out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, scale=scale)
        # Kernels may fill the queries up to a multiple of their tile.
        return out, lse[..., : q.shape[1]]


class Sage(Backend):
    """Queries and keys are quantised to INT8, values to FP16 or FP8."""

    name = "sage"
    exact = False
    package = "sageattention"
    module = "sageattention"
    install = "pip install sageattention (1.x, Triton; version 2 is built from source)"
    limits = Limits(devices=("cuda",), min_capability=(8, 0), max_head_dim=128, lse=False, backward=False)

    def _execute(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        return self._load().sageattn(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=scale), None
