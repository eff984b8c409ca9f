"""Single tokens of a video: which one a number means, where it stands, and reading chosen ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.cache.base import Geometry
from longtake.cache.storage import Stored, take_tokens


@dataclass(frozen=True)
class ChosenTokens:
    """Some of the tokens of ``stored``, taken when they are asked for.

    Attributes:
        stored: Tokens to choose from.
        index: (tokens,) or (batch, tokens), int64, into ``stored``.
    """

    stored: Stored
    index: Tensor

    @property
    def num_tokens(self) -> int:
        """How many, per sample."""
        return self.index.shape[-1]

    @property
    def keys(self) -> Tensor:
        """(batch, tokens, heads, head_dim), un-rotated."""
        return take_tokens(self.stored.keys, self.index)

    @property
    def values(self) -> Tensor:
        """(batch, tokens, heads, head_dim)."""
        return take_tokens(self.stored.values, self.index)


def token_numbers(geometry: Geometry, start_frame: int, num_frames: int) -> Tensor:
    """Numbers of the tokens of consecutive frames, counted from the video's first token.

    Returns:
        (batch, tokens), int64.
    """
    size = geometry.tokens_per_frame
    numbers = torch.arange(start_frame * size, (start_frame + num_frames) * size, device=geometry.device)
    return numbers.expand(geometry.batch_size, -1)


def coordinates(numbers: Tensor, geometry: Geometry) -> Tensor:
    """Where tokens stand in the video.

    Args:
        numbers: (batch, tokens), as ``token_numbers`` counts them.
        geometry: Shapes of the rollout.

    Returns:
        (batch, tokens, 3), float64: frame, row, column.
    """
    if numbers.device.type == "meta":
        # Played for sizes alone, where PyTorch's arithmetic is Python: milliseconds for each operation.
        return numbers.new_empty((*numbers.shape, 3), dtype=torch.float64)
    cells = numbers % geometry.tokens_per_frame
    axes = (numbers // geometry.tokens_per_frame, cells // geometry.num_columns, cells % geometry.num_columns)
    return torch.stack(axes, dim=-1).double()
