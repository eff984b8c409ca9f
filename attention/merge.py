"""Attention over several sets of keys, from the attention over each: exact, as if the keys had stood together."""

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_parts(
    parts: Sequence[tuple[Tensor, Tensor]], log_weights: Sequence[float | Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Join parts that the same queries read separately.

    A key that stands for n keys, as after merging or compression, counts n times with the log-weight log(n).

    Args:
        parts: For each set of keys the result, (batch, queries, heads, head_dim), and the log-sum-exp of its scores,
            natural logarithm, (batch, heads, queries); -inf where a query read nothing.
        log_weights: Added to all scores of a part: numbers, or tensors that broadcast to the log-sum-exp.

    Returns:
        The joint result in the dtype of the first part, 0 where nothing was read, and its log-sum-exp.

    Raises:
        ValueError: If there are no parts, or not as many weights.
    """
    if not parts:
        raise ValueError("parts is empty: give at least one.")
    if log_weights is not None and len(log_weights) != len(parts):
        raise ValueError(f"{len(log_weights)} log_weights for {len(parts)} parts: give one for each, 0 to leave it.")
    sums = [lse for _, lse in parts]
    if log_weights is not None:
        sums = [lse + weight for lse, weight in zip(sums, log_weights, strict=True)]
    stacked = torch.stack(sums)
    total = stacked.logsumexp(0)
    # Where nothing was read at all the difference of two infinities is not a number; the share is none.
    shares = (stacked - total).exp().nan_to_num(0.0)
    wide = torch.promote_types(parts[0][0].dtype, torch.float32)
    joint = sum(out.to(wide) * share.transpose(1, 2)[..., None] for (out, _), share in zip(parts, shares, strict=True))
    return joint.to(parts[0][0].dtype), total
