"""xformers' memory-efficient attention: dense, and float32 on graphics cards too old for flash-attn.

Written from the package's documented interface and not run by the project yet, so ``auto`` passes it by.
"""

import torch
from torch import Tensor

from longtake.attention.executors.base import Executor, Limits
from longtake.attention.plan import BlockPlan


class Xformers(Executor):
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
