"""Tokens of a new frame that correspond to stored ones, and making one of two."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from longtake.cache.storage import KeysValues, Stored, take_tokens

SAME_PLACE = 1e-4  # what a token at the same place in the frame is ahead of an equally similar one elsewhere
ROUNDING = 1e-6  # of the cosine of equal keys


def random_projection(num_channels: int, num_projections: int, like: Tensor) -> Tensor | None:
    """Directions in which near keys stay near: (num_channels, num_projections), the same in every run.

    None where all channels are no more, or ``num_projections`` is 0: then neighbours are found exactly.
    """
    if not 0 < num_projections < num_channels:
        return None
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_channels, num_projections, generator=generator).to(like.device, like.dtype)


def directions(keys: Tensor, projection: Tensor | None) -> Tensor:
    """What neighbours are looked for in: (batch, tokens, channels), the mean cosine of heads as a product of two.

    Args:
        keys: (batch, tokens, heads, head_dim), un-rotated.
        projection: From ``random_projection``; None: all channels.
    """
    unit = _unit(keys)
    return unit if projection is None else normalize(unit @ projection, dim=-1)


def merge_repeats(
    old: Stored,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    counts: Tensor,
    cells: Tensor,
    *,
    tokens_per_frame: int,
    min_similarity: float,
) -> tuple[Tensor, Tensor]:
    """Merge new tokens, frame by frame, with those before them that they repeat.

    Two tokens correspond if each is the other's nearest by the mean cosine of their heads' keys. The older one is
    counted with the newer one from then on, whose value becomes the mean over all that it stands for.

    Args:
        old: Stored tokens; only those that correspond to a new one are looked at.
        keys: (batch, new tokens, heads, head_dim), un-rotated; whole frames.
        values: Same shape.
        seen: ``directions`` of all tokens, the stored ones first.
        counts: (batch, stored tokens), how many each stands for; 0: none any more.
        cells: (batch, stored tokens), int64, their places in the frame.
        tokens_per_frame: Tokens of a new frame.
        min_similarity: Mean cosine from which tokens are merged.

    Returns:
        Values of the new tokens, (batch, new tokens, heads, head_dim); counts of all tokens, (batch, tokens).

    Source: lemma and "last key" of TempCache, arXiv:2602.01801.
    """
    batch, num_old, values = keys.shape[0], counts.shape[1], values.clone()
    if keys.device.type == "meta":  # played for sizes alone, which merging does not change
        return values, counts.new_empty((batch, num_old + keys.shape[1]))
    old = KeysValues(old.keys, old.values)  # decoded once, where they are encoded
    own = torch.arange(tokens_per_frame, device=keys.device).expand(batch, -1)
    for start in range(0, keys.shape[1], tokens_per_frame):
        new, known = slice(start, start + tokens_per_frame), num_old + start
        weights = torch.zeros_like(own, dtype=counts.dtype)
        if known:
            similarity = seen[:, known : known + tokens_per_frame] @ seen[:, :known].mT
            older, is_mutual = _nearest(similarity, counts, cells)
            theirs = _take(old.keys, keys[:, :start], older)
            cosines = (_unit(keys[:, new]) * _unit(theirs)).sum(dim=-1, dtype=torch.float32)
            weights = counts.gather(1, older) * (is_mutual & (cosines >= min_similarity - ROUNDING))
            counts = counts.scatter_add(1, older, -weights)
            share = weights[..., None, None]
            mean = (values[:, new].float() + share * _take(old.values, values[:, :start], older).float()) / (1 + share)
            values[:, new] = mean.to(values.dtype)
        counts, cells = torch.cat((counts, 1 + weights), dim=1), torch.cat((cells, own), dim=1)
    return values, counts


def _unit(keys: Tensor) -> Tensor:
    """(batch, tokens, channels): the product of two is the mean cosine of their heads."""
    return normalize(keys, dim=-1).flatten(2) / keys.shape[2] ** 0.5


def _take(old: Tensor, new: Tensor, index: Tensor) -> Tensor:
    """Tokens of both, counted through, without putting all of them into one tensor."""
    num_old = old.shape[1]
    if not num_old or not new.shape[1]:
        return take_tokens(old if num_old else new, index)
    chosen = take_tokens(old, index.clamp(max=num_old - 1))
    return torch.where((index < num_old)[..., None, None], chosen, take_tokens(new, (index - num_old).clamp(min=0)))


def _nearest(similarity: Tensor, counts: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Of every new token the nearest known one, and whether it is the nearest of that one, too.

    Args:
        similarity: (batch, new tokens, known tokens); changed in place.
        counts: (batch, known tokens).
        cells: (batch, known tokens).

    Returns:
        Indices and truth, (batch, new tokens) each.
    """
    similarity = similarity.float().masked_fill_(counts[:, None] == 0, -torch.inf)
    ahead = torch.full_like(similarity[:, :1], SAME_PLACE)
    similarity.scatter_add_(1, cells[:, None], ahead)
    older = similarity.argmax(dim=2)
    # Only the columns that were chosen matter, few of all.
    newer = similarity.gather(2, older[:, None].expand(-1, similarity.shape[1], -1)).argmax(dim=1)
    return older, newer == torch.arange(similarity.shape[1], device=similarity.device)
