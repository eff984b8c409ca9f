"""Means over blocks of tokens, and the best blocks by a score."""

import torch
from torch import Tensor


def block_means(x: Tensor, edges: Tensor) -> Tensor:
    """Average tokens over blocks of any sizes.

    Args:
        x: (tokens, heads, head_dim), any float dtype.
        edges: (blocks + 1,), whole numbers ascending from 0 to the tokens; no block is empty.

    Returns:
        (blocks, heads, head_dim), float32, on x's device.
    """
    sizes = edges.diff().to(x.device, torch.long)
    block = torch.repeat_interleave(torch.arange(len(sizes), device=x.device), sizes)
    sums = torch.zeros(len(sizes), *x.shape[1:], dtype=torch.float32, device=x.device)
    return sums.index_add_(0, block, x.float()) / sizes[:, None, None]


def merged_means(means: Tensor, sizes: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Average block means over groups of blocks, each block by its size.

    Args:
        means: (blocks, heads, head_dim).
        sizes: (blocks,) tokens of each.
        group: (blocks,), int64: the group of each block.
        num_groups: How many groups there are; none is empty.

    Returns:
        (num_groups, heads, head_dim).
    """
    sizes = sizes.to(means)[:, None, None]
    sums = means.new_zeros(num_groups, *means.shape[1:]).index_add_(0, group, means * sizes)
    return sums / means.new_zeros(num_groups, 1, 1).index_add_(0, group, sizes)


def best(scores: Tensor, count: Tensor | int, *, tiers: Tensor | None = None) -> Tensor:
    """Take the best entries of every row.

    Args:
        scores: (..., entries), higher is better. Of equal ones the first is taken.
        count: How many to take, for all rows or (...,) for each.
        tiers: (..., entries), whole numbers: entries of a lower tier come before all of a higher one, whatever their
            score.

    Returns:
        (..., entries), bool.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    if tiers is not None:
        by_tier = tiers.expand_as(scores).gather(-1, order).argsort(dim=-1, stable=True)
        order = order.gather(-1, by_tier)
    count = torch.as_tensor(count, device=scores.device)[..., None]
    is_taken = torch.arange(scores.shape[-1], device=scores.device).expand_as(order) < count
    return torch.zeros_like(is_taken).scatter_(-1, order, is_taken)
