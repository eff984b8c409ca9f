"""The two orders of Sparse VideoGen, frame by frame and place by place, and the band that is laid over them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """An order of queries and keys.

    Attributes:
        q_perm: (queries,), int64: the query at each place.
        k_perm: (keys,), int64: the key at each place.
        own: (queries,), int64: for each query place the place of the query's own key.
    """

    q_perm: Tensor
    k_perm: Tensor
    own: Tensor


def layouts(num_query_frames: int, num_key_frames: int, tokens_per_frame: int) -> tuple[Layout, Layout]:
    """Frame by frame, and place by place.

    Args:
        num_query_frames: Frames that ask; they are the last of the key frames.
        num_key_frames: Frames of the keys.
        tokens_per_frame: Tokens of a frame.

    Returns:
        The spatial and the temporal layout.
    """
    past = num_key_frames - num_query_frames
    shapes = [(frames, tokens_per_frame) for frames in (num_query_frames, num_key_frames)]
    plain, turned = [], []
    for frames, tokens in shapes:
        order = torch.arange(frames * tokens)
        plain.append(order)
        turned.append(order.view(frames, tokens).T.reshape(-1))
    own = plain[0] + past * tokens_per_frame
    place = torch.empty_like(turned[1])
    place[turned[1]] = plain[1]
    return Layout(*plain, own), Layout(*turned, place[own[turned[0]]])


def half_width(own: Tensor, num_keys: int, density: float) -> int:
    """Half the width of a band around each query's own place that covers a share of all pairs.

    For a square of S tokens it is S (1 - sqrt(1 - density)), as the source has it.

    Args:
        own: (queries,) place of each query's own key.
        num_keys: Keys.
        density: Share of the pairs, 0 to 1.

    Returns:
        The least whole number of tokens with that share.
    """
    low, high = 0, num_keys
    while low < high:
        width = (low + high) // 2
        covered = (own + width).clamp(max=num_keys - 1) - (own - width).clamp(min=0) + 1
        if int(covered.sum()) >= density * num_keys * len(own):
            high = width
        else:
            low = width + 1
    return low
