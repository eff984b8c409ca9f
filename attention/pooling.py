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
    edges = edges.to(x.device, torch.long)
    sizes = edges.diff()
    if x.device.type == "cpu":
        block = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        return sum_by_group(x.float(), block, len(sizes)) / sizes[:, None, None]
    return _padded_means(x, edges, sizes)


def _padded_means(x: Tensor, edges: Tensor, sizes: Tensor) -> Tensor:
    """``block_means`` with all blocks filled up to the longest: one sum each, in one order."""
    place = torch.arange(int(sizes.max()), device=x.device)
    tokens = (edges[:-1, None] + place).clamp(max=len(x) - 1)
    is_own = (place < sizes[:, None])[..., None, None]
    return x[tokens].float().where(is_own, 0).sum(1) / sizes[:, None, None]


def sum_by_group(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Add up rows by group, in an order that is the same in every run.

    Args:
        values: (rows, ...), float.
        group: (rows,), int64: the group of each row.
        num_groups: How many groups there are; one may be empty.

    Returns:
        (num_groups, ...), dtype of the values.
    """
    if values.device.type == "cpu":
        return values.new_zeros(num_groups, *values.shape[1:]).index_add_(0, group, values)
    return _product_sums(values, group, num_groups)


def _product_sums(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """``sum_by_group`` as a product of matrices: GPUs add by index in whatever order threads come, products do not."""
    is_member = (group == torch.arange(num_groups, device=values.device)[:, None]).to(values)
    return (is_member @ values.flatten(1)).view(num_groups, *values.shape[1:])


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
    return sum_by_group(means * sizes, group, num_groups) / sum_by_group(sizes, group, num_groups)


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
