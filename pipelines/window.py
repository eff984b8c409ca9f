"""Blocks that are denoised together: a window that rolls over the video, one block further per finished block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longtake.samplers import Sampler


@dataclass(frozen=True)
class OpenBlock:
    """A block in the window.

    Attributes:
        index: From 0, given latents not counted.
        start_frame: First latent frame in the video.
        latents: (batch, frames, channels, height, width), as noisy as ``level`` says.
        level: Denoising steps it has been through.
        prompt_index: The prompt it entered under.
    """

    index: int
    start_frame: int
    latents: Tensor
    level: int
    prompt_index: int

    @property
    def num_frames(self) -> int:
        """Latent frames."""
        return self.latents.shape[1]


class RollingBlocks:
    """The blocks of a window, cleanest first.

    Args:
        sampler: Of the kind that denoises several blocks together.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.blocks: list[OpenBlock] = []

    @property
    def is_full(self) -> bool:
        """Whether the next forward finishes a block, so that no other may enter before it."""
        return len(self.blocks) >= self.sampler.num_window_blocks

    def enter(self, block: OpenBlock) -> None:
        """Take in the next block of the video, pure noise."""
        self.blocks.append(block)

    def frame_timesteps(self, timesteps: Sequence[float]) -> tuple[float, ...]:
        """Timesteps of equal parts of the window: of blocks, or of frames where blocks differ in length."""
        lengths = [block.num_frames for block in self.blocks]
        if len(set(lengths)) == 1:
            return tuple(timesteps)
        return tuple(t for t, length in zip(timesteps, lengths, strict=True) for _ in range(length))

    def advance(self, denoise, renoise) -> OpenBlock | None:
        """Denoise the window once.

        Args:
            denoise: (blocks, their timesteps) -> x0 of each.
            renoise: ``OpenBlock`` -> fresh noise after its level.

        Returns:
            The first block, if it is clean now; it has left the window.
        """
        following = self.sampler.advance(
            denoise,
            [block.latents for block in self.blocks],
            levels=[block.level for block in self.blocks],
            renoise=lambda place: renoise(self.blocks[place]),
        )
        self.blocks = [
            OpenBlock(b.index, b.start_frame, latents, b.level + 1, b.prompt_index)
            for b, latents in zip(self.blocks, following, strict=True)
        ]
        is_clean = self.blocks[0].level == self.sampler.num_steps(self.blocks[0].index)
        return self.blocks.pop(0) if is_clean else None

    def state_dict(self) -> tuple[dict[str, Tensor], list[dict[str, int]]]:
        """Latents by place, and plain numbers of every block."""
        tensors = {str(place): block.latents for place, block in enumerate(self.blocks)}
        names = ("index", "start_frame", "level", "prompt_index")
        return tensors, [{name: getattr(block, name) for name in names} for block in self.blocks]

    def load_state_dict(
        self, tensors: Mapping[str, Tensor], numbers: Sequence[Mapping[str, Any]], device: torch.device
    ) -> None:
        """Take over a saved window."""
        self.blocks = [
            OpenBlock(latents=tensors[str(place)].to(device), **values) for place, values in enumerate(numbers)
        ]
