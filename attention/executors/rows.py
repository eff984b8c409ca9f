"""Tokens of a group of rows taken out of (batch, tokens, heads, head_dim) tensors, and results put back."""

import math

import torch
from torch import Tensor

from longtake.attention.plan_forms import Ranges, RowGroup


def take(x: Tensor, ranges: Ranges, buffer: Tensor | None = None) -> Tensor:
    """Runs of the tokens of (batch, tokens, heads, head_dim), end to end; a view where it is one run.

    Args:
        x: The tokens.
        ranges: (start, stop) of every run.
        buffer: Flat memory that is written to instead of new memory, large enough and of the same dtype.
    """
    parts = [x[:, start:stop] for start, stop in ranges]
    if len(parts) == 1:
        return parts[0]
    if buffer is None:
        return torch.cat(parts, dim=1)
    shape = (x.shape[0], sum(part.shape[1] for part in parts), *x.shape[2:])
    return torch.cat(parts, dim=1, out=buffer[: math.prod(shape)].view(shape))


def take_heads(x: Tensor, group: RowGroup, queries_per_key: int = 1) -> Tensor:
    """The heads of a group; of keys, those that its queries share; all, and as they are, for a group of all."""
    if group.heads is None:
        return x
    return x[:, :, [head // queries_per_key for head in group.heads]]


def put(out: Tensor, lse: Tensor | None, group: RowGroup, part: Tensor, part_lse: Tensor | None) -> None:
    """Write the result of a group.

    Args:
        out: (batch, queries, heads, head_dim), written to.
        lse: (batch, heads, queries), written to; None: not wanted.
        group: Whose result it is.
        part: (batch, queries of the group, heads of the group, head_dim).
        part_lse: (batch, heads of the group, queries of the group).
    """
    heads = slice(None) if group.heads is None else list(group.heads)
    start = 0
    for first, stop in group.q_ranges:
        end = start + stop - first
        out[:, first:stop, heads] = part[:, start:end]
        if lse is not None:
            lse[:, heads, first:stop] = part_lse[:, :, start:end]
        start = end
