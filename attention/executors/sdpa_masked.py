"""PyTorch's attention under the plan's mask, token by token: the reference of all others, and slower than dense."""

from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longtake.attention.executors.base import FLOATS, Executor, Limits
from longtake.attention.lse import attend
from longtake.attention.plan import BlockPlan

MAX_MASK = 1 << 26
"""Entries of the mask made at a time, 64 MiB."""

MAX_KEPT = 1 << 20
"""Entries of a mask that is kept as long as its plan lives: small calls would take as long to make it."""

_kept: WeakKeyDictionary[BlockPlan, Tensor] = WeakKeyDictionary()


class SdpaMasked(Executor):
    """Every pair is computed and those that the plan leaves out are dropped."""

    name = "sdpa_masked"
    limits = Limits(devices=("cpu", "cuda", "mps", "xpu"), dtypes=FLOATS, plans="per_head", needs_plan=True)
    verified_on = frozenset({"cpu", "cuda"})

    def _execute(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        parts, start = [], 0
        for mask in _masks(plan, q.device):
            rows = slice(start, start + mask.shape[2])
            parts.append(attend(q[:, rows], k, v, scale=scale, mask=mask, return_lse=return_lse))
            start = rows.stop
        if len(parts) == 1:
            return parts[0]
        out = torch.cat([part for part, _ in parts], dim=1)
        return out, torch.cat([lse for _, lse in parts], dim=2) if return_lse else None


def _masks(plan: BlockPlan, device: torch.device) -> Iterator[Tensor]:
    """(1, 1 or heads, some queries, keys), bool, for all queries in order."""
    if plan in _kept and _kept[plan].device == device:
        yield _kept[plan]
        return
    per_query = plan.num_heads * plan.num_keys
    moved = plan.to(device)
    if per_query * plan.num_queries <= MAX_KEPT:
        with torch.inference_mode(False):  # a later call may need gradients
            _kept[plan] = moved.to_dense_mask()[None].clone()
        yield _kept[plan]
        return
    for queries in torch.arange(plan.num_queries, device=device).split(max(1, MAX_MASK // per_query)):
        yield moved.to_dense_mask(queries)[None]
