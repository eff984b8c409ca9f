"""Tokens of a group of rows taken out of (batch, tokens, heads, head_dim) tensors, and results put back."""

import math
from functools import lru_cache

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
    if len(ranges) == 1:
        start, stop = ranges[0]
        return x[:, start:stop]
    places = _places(ranges, x.device)
    if buffer is None:
        return x.index_select(1, places)
    shape = (x.shape[0], len(places), *x.shape[2:])
    # Selecting by index shares the copying among threads; joining slices would leave it to one.
    return torch.index_select(x, 1, places, out=buffer[: math.prod(shape)].view(shape))


@lru_cache(maxsize=512)
def _places(ranges: Ranges, device: torch.device) -> Tensor:
    """All numbers of some runs."""
    with torch.inference_mode(False):  # it is kept, and a later call may need gradients
        return torch.cat([torch.arange(start, stop, device=device) for start, stop in ranges])


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
