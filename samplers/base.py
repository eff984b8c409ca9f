"""The contract of a sampler, and the samplers by the name that YAML uses."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from longtake.configs.fields import make
from longtake.configs.registry import Registry

Denoise = Callable[[Tensor, float], Tensor]
"""(x, timestep) -> x0, all (batch, frames, channels, height, width); timestep 0 to 1000."""

Renoise = Callable[[int], Tensor]
"""step_index -> Gaussian noise of the block's shape, on its device and in its dtype."""


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """Validated settings of a one-block sampler.

    Class attributes:
        name: Key in YAML and on the command line.
        source: Paper or repository.
        is_renoising: Whether it goes from level to level by ``renoised`` alone, so that latents may be half precision.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    is_renoising: ClassVar[bool] = False

    @abstractmethod
    def sample(self, denoise: Denoise, x: Tensor, *, renoise: Renoise, block_index: int) -> Tensor:
        """Turn a block of noise into clean latents.

        Args:
            denoise: The network's estimate of the clean block; called ``num_steps(block_index)`` times.
            x: (batch, frames, channels, height, width), Gaussian noise.
            renoise: Fresh noise after a step.
            block_index: Which block of the rollout, from 0.

        Returns:
            Clean latents, shape and dtype of ``x``.
        """

    @abstractmethod
    def num_steps(self, block_index: int) -> int:
        """Denoising steps of a block."""

    @property
    def num_window_blocks(self) -> int:
        """Blocks that are denoised together; more than 1 in samplers that have ``advance`` (``RollingWindow``)."""
        return 1

    @property
    def guidance_scale(self) -> float:
        """Scale of classifier-free guidance; 1 runs the conditional branch alone."""
        return 1.0

    def settings(self) -> dict[str, Any]:
        """The sampler as its YAML mapping: name and fields."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"name": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def renoised(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Clean latents at noise share ``sigma``: (1 - sigma) x0 + sigma noise.

    Half precision is computed in float32 with the share rounded to float32, and rounded once, as Self-Forcing does.

    Args:
        x0: Clean latents.
        noise: Same shape and dtype.
        sigma: Noise share.
    """
    if torch.finfo(x0.dtype).bits >= 32:
        return (1.0 - sigma) * x0 + sigma * noise
    sigma = torch.tensor(sigma, dtype=torch.float32).item()
    return ((1.0 - sigma) * x0.float() + sigma * noise.float()).to(x0.dtype)


def shifted(share: float, shift: float) -> float:
    """Flow shift of a noise share: s u / (1 + (s - 1) u).

    Source: Stable Diffusion 3, arXiv:2403.03206, section 5.3.2; Self-Forcing's timestep_shift.
    """
    return shift * share / (1.0 + (shift - 1.0) * share)


SAMPLERS = Registry(
    Sampler,
    {
        "few_step": "samplers.few_step:FewStep",
        "multi_step": "samplers.multi_step:MultiStep",
        "rolling_window": "samplers.rolling_window:RollingWindow",
    },
)


def make_sampler(settings: Sampler | Mapping[str, Any] | str) -> Sampler:
    """Make a sampler from its YAML mapping.

    Args:
        settings: ``{"name": NAME, field: value, ...}``, a name alone (all defaults), or a sampler, which is returned.

    Raises:
        ValueError: If the name or a field is unknown, with the nearest known one, or a value does not fit.
    """
    if isinstance(settings, Sampler):
        return settings
    return make(SAMPLERS, settings, key="name", what="sampler")
