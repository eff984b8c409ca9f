"""Latents that a rollout is given to go on from: a tensor, or a stream that makes them as they are taken."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class GivenLatents(Protocol):
    """Given latents as a rollout takes them: from the first frame on, a block at a time, each once.

    Attributes:
        num_frames: Latent frames in all.
    """

    num_frames: int

    def take(self, num_frames: int) -> Tensor:
        """The next latent frames: (batch, frames, channels, height, width), normalised."""


class TensorLatents:
    """A tensor of given latents.

    Args:
        latents: (batch, frames, channels, height, width), normalised.
    """

    def __init__(self, latents: Tensor) -> None:
        self.num_frames = latents.shape[1]
        self._latents = latents
        self._next_frame = 0

    def take(self, num_frames: int) -> Tensor:
        """The next latent frames: (batch, frames, channels, height, width)."""
        start = self._next_frame
        self._next_frame += num_frames
        return self._latents[:, start : self._next_frame]


class TakenLatents:
    """Stands for given latents that a saved state holds already; it has none to give.

    Args:
        num_frames: Latent frames that the state was given.
    """

    def __init__(self, num_frames: int) -> None:
        self.num_frames = num_frames

    def take(self, num_frames: int) -> Tensor:
        """Refuses.

        Raises:
            ValueError: Always: the state has to be loaded first.
        """
        raise ValueError(
            f"the {self.num_frames} latent frames that this video goes on from are in none of its saved states: "
            "make it anew from its image or clip."
        )


def given_latents(
    latents: Tensor | GivenLatents | None, *, batch_size: int, frame_shape: Sequence[int]
) -> GivenLatents | None:
    """Bring given latents into the form of a stream.

    Raises:
        ValueError: If a tensor has another shape than (batch, frames, channels, height, width).
    """
    if not isinstance(latents, Tensor):
        return latents
    wanted = (batch_size, latents.shape[1] if latents.ndim > 1 else 0, *frame_shape)
    if tuple(latents.shape) != wanted:
        raise ValueError(f"initial_latents has shape {tuple(latents.shape)}, expected {wanted}.")
    return TensorLatents(latents)
