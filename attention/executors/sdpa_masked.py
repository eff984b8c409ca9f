"""PyTorch's attention under the plan's mask, token by token: the reference of all others, and no faster than dense."""

import torch
from torch import Tensor

from longtake.attention.executors.base import FLOATS, Executor, Limits
from longtake.attention.lse import attend
from longtake.attention.plan import BlockPlan

MAX_MASK = 1 << 26
"""Entries of the mask made at a time, 64 MiB."""


class SdpaMasked(Executor):
    """Every pair is computed and those that the plan leaves out are dropped."""

    name = "sdpa_masked"
    limits = Limits(devices=("cpu", "cuda", "mps", "xpu"), dtypes=FLOATS, plans="per_head", needs_plan=True)
    verified_on = frozenset({"cpu", "cuda"})

    def _execute(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        plan = plan.to(q.device) if plan.counts.device != q.device else plan
        rows = max(1, MAX_MASK // (plan.num_heads * plan.num_keys))
        parts = []
        for start in range(0, plan.num_queries, rows):
            queries = torch.arange(start, min(start + rows, plan.num_queries), device=q.device)
            mask = plan.to_dense_mask(queries)[None]
            parts.append(attend(q[:, start : start + rows], k, v, scale=scale, mask=mask, return_lse=return_lse))
        out = torch.cat([part for part, _ in parts], dim=1)
        return out, torch.cat([lse for _, lse in parts], dim=2) if return_lse else None
