"""The sampler of distilled models: estimate the clean block, re-noise it to the next level, repeat."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from longtake.samplers.base import Denoise, Renoise, Sampler, renoised, shifted


def few_step(denoise: Denoise, x: Tensor, *, sigmas: Sequence[float], renoise: Renoise) -> Tensor:
    """Alternate x0 estimates and fresh noise (consistency sampling; Self-Forcing, arXiv:2506.08009).

    Args:
        denoise: (x, timestep) -> x0.
        x: (batch, frames, channels, height, width), at noise share ``sigmas[0]``.
        sigmas: Noise shares, falling; the timestep is 1000 times the share.
        renoise: Noise after step i.

    Returns:
        The last estimate of the clean block.
    """
    x0 = x
    for step_index, sigma in enumerate(sigmas):
        x0 = denoise(x, 1000.0 * sigma)
        if step_index + 1 < len(sigmas):
            x = renoised(x0, renoise(step_index), sigmas[step_index + 1])
    return x0


@dataclass(frozen=True, kw_only=True)
class FewStep(Sampler):
    """Distilled few-step sampling with re-noising (Self-Forcing, arXiv:2506.08009).

    ``timesteps`` are raw and warped by ``flow_shift``: [1000, 750, 500, 250] at shift 5 run at
    1000, 937.5, 833.3 and 625. A trailing 0 is refused: the last step already returns the clean block.

    CausVid's and Krea's lists are the levels themselves: ``warp: false`` runs them as they stand, and ``flow_shift``
    has no part. Their code adds noise at the nearest of 1,000 shifted levels instead, which differs by less than
    0.0005 of the noise share.
    """

    name: ClassVar[str] = "few_step"
    source: ClassVar[str] = "Self-Forcing, arXiv:2506.08009"
    is_renoising: ClassVar[bool] = True

    timesteps: tuple[float, ...] = (1000, 750, 500, 250)
    flow_shift: float = 5.0
    first_block_timesteps: tuple[float, ...] | None = None  # Causal-Forcing++ spends more steps on the first block
    warp: bool = True  # false: the timesteps are levels already

    def __post_init__(self) -> None:
        check_flow_shift(self.flow_shift)
        check_timesteps("timesteps", self.timesteps)
        if self.first_block_timesteps is not None:
            check_timesteps("first_block_timesteps", self.first_block_timesteps)

    def sigmas(self, block_index: int) -> tuple[float, ...]:
        """Noise shares of a block's steps, warped."""
        first = block_index == 0 and self.first_block_timesteps is not None
        raw = self.first_block_timesteps if first else self.timesteps
        shift = self.flow_shift if self.warp else 1.0
        return tuple(shifted(timestep / 1000.0, shift) for timestep in raw)

    def num_steps(self, block_index: int) -> int:
        """Denoising steps of a block."""
        return len(self.sigmas(block_index))

    def sample(self, denoise: Denoise, x: Tensor, *, renoise: Renoise, block_index: int) -> Tensor:
        """Turn a block of noise into clean latents."""
        return few_step(denoise, x, sigmas=self.sigmas(block_index), renoise=renoise)


def check_timesteps(name: str, timesteps: Sequence[float]) -> None:
    """Refuse a step list that is empty, does not fall or leaves (0, 1000].

    Raises:
        ValueError: With the list and the remedy.
    """
    falls = all(a > b for a, b in zip(timesteps, timesteps[1:], strict=False))
    if not timesteps or not falls or timesteps[0] > 1000 or timesteps[-1] <= 0:
        raise ValueError(
            f"{name}={list(timesteps)} must fall from at most 1000 and stay above 0, e.g. [1000, 750, 500, 250] "
            "(leave out a trailing 0)."
        )


def check_flow_shift(flow_shift: float) -> None:
    """Refuse a flow shift that is not positive.

    Raises:
        ValueError: With the value and the usual one.
    """
    if not flow_shift > 0:
        raise ValueError(f"flow_shift={flow_shift} must be above 0; Wan and Self-Forcing use 5.0.")
