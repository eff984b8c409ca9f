"""The sampler of Rolling Forcing: a window of blocks at rising noise levels, denoised together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from longtake.samplers.base import Denoise, Renoise, Sampler, renoised, shifted
from longtake.samplers.few_step import check_flow_shift, check_timesteps, few_step

DenoiseTogether = Callable[[list[Tensor], list[float]], list[Tensor]]
"""(blocks, their timesteps) -> x0 of each; a block is (batch, frames, channels, height, width)."""


def rolling_window(
    denoise: DenoiseTogether,
    blocks: Sequence[Tensor],
    *,
    levels: Sequence[int],
    sigmas: Sequence[float],
    renoise: Callable[[int], Tensor],
) -> list[Tensor]:
    """Denoise a window once and take every block to its next level (Rolling Forcing, arXiv:2509.25161).

    Args:
        denoise: One joint estimate of all clean blocks.
        blocks: Cleanest first.
        levels: Of each block: its place in ``sigmas``.
        sigmas: Noise shares, falling; the timestep is 1000 times the share.
        renoise: Fresh noise for the block at a place of the window.

    Returns:
        Each block at its next level; clean where it was at the last one.
    """
    estimates = denoise(list(blocks), [1000.0 * sigmas[level] for level in levels])
    following = []
    for place, (x0, level) in enumerate(zip(estimates, levels, strict=True)):
        if level + 1 < len(sigmas):
            x0 = renoised(x0, renoise(place), sigmas[level + 1])
        following.append(x0)
    return following


@dataclass(frozen=True, kw_only=True)
class RollingWindow(Sampler):
    """Joint denoising of as many blocks as there are steps (Rolling Forcing, arXiv:2509.25161).

    Once the window is full, every forward takes all its blocks one level further: the first one becomes clean and
    leaves, a block of pure noise enters behind. So a new prompt shows from the first block on that has not entered
    yet. ``timesteps`` are raw and warped by ``flow_shift``, as in ``few_step``.

    Differs from the released code in what it does not compute: blocks at the first window's left are committed once,
    when they are clean.
    """

    name: ClassVar[str] = "rolling_window"
    source: ClassVar[str] = "Rolling Forcing, arXiv:2509.25161"
    is_renoising: ClassVar[bool] = True

    timesteps: tuple[float, ...] = (1000, 800, 600, 400, 200)
    flow_shift: float = 5.0
    guidance_scale: float = 1.0  # distilled models need none

    def __post_init__(self) -> None:
        check_flow_shift(self.flow_shift)
        if self.guidance_scale < 0:
            raise ValueError(f"guidance_scale={self.guidance_scale} must be 0 or more; 1 turns guidance off.")
        check_timesteps("timesteps", self.timesteps)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise shares of the levels, warped."""
        return tuple(shifted(timestep / 1000.0, self.flow_shift) for timestep in self.timesteps)

    @property
    def num_window_blocks(self) -> int:
        """Blocks that are denoised together: one per level."""
        return len(self.timesteps)

    def num_steps(self, block_index: int) -> int:
        """Denoising steps of a block."""
        return len(self.timesteps)

    def sample(self, denoise: Denoise, x: Tensor, *, renoise: Renoise, block_index: int) -> Tensor:
        """What a block goes through that is alone in its window."""
        return few_step(denoise, x, sigmas=self.sigmas, renoise=renoise)

    def advance(
        self,
        denoise: DenoiseTogether,
        blocks: Sequence[Tensor],
        *,
        levels: Sequence[int],
        renoise: Callable[[int], Tensor],
    ) -> list[Tensor]:
        """Take every block of a window to its next level."""
        return rolling_window(denoise, blocks, levels=levels, sigmas=self.sigmas, renoise=renoise)
