"""Noise sources, and samplers of one block as plain functions of tensors with their validated settings."""

import hashlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from longtake.configs.fields import make

Denoise = Callable[[Tensor, float], Tensor]
"""(x, timestep) -> x0, all (batch, frames, channels, height, width); timestep 0 to 1000."""

Renoise = Callable[[int], Tensor]  # index -> Gaussian noise of the block's shape, on its device and in its dtype


def shifted(share: float, shift: float) -> float:
    """Flow shift of a noise share: s u / (1 + (s - 1) u).

    Source: Stable Diffusion 3, arXiv:2403.03206, section 5.3.2; Self-Forcing's timestep_shift.
    """
    return shift * share / (1.0 + (shift - 1.0) * share)


def _renoised(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Clean latents at noise share ``sigma``: (1 - sigma) x0 + sigma noise.

    Half precision is computed in float32 with the share rounded to float32, and rounded once, as Self-Forcing does.
    """
    if torch.finfo(x0.dtype).bits >= 32:
        return (1.0 - sigma) * x0 + sigma * noise
    sigma = torch.tensor(sigma, dtype=torch.float32).item()
    return ((1.0 - sigma) * x0.float() + sigma * noise.float()).to(x0.dtype)


def few_step(denoise: Denoise, x: Tensor, *, sigmas: Sequence[float], renoise: Renoise) -> Tensor:
    """Alternate x0 estimates and fresh noise (consistency sampling; Self-Forcing, arXiv:2506.08009).

    Args:
        denoise: (x, timestep) -> x0; the timestep is 1000 times the noise share.
        x: (batch, frames, channels, height, width), at noise share ``sigmas[0]``.
        sigmas: Noise shares, falling.
        renoise: Noise after a step, by its index.

    Returns:
        The last estimate of the clean block.
    """
    x0 = x
    for step_index, sigma in enumerate(sigmas):
        x0 = denoise(x, 1000.0 * sigma)
        if step_index + 1 < len(sigmas):
            x = _renoised(x0, renoise(step_index), sigmas[step_index + 1])
    return x0


def multi_step(denoise: Denoise, x: Tensor, *, scheduler: Any) -> Tensor:
    """Follow the flow with a fresh diffusers scheduler whose steps are set; arguments as ``few_step``."""
    scheduler.set_begin_index(0)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):
        # UniPC's timesteps are whole numbers, as in the original code; a share that rounds to 0 stays itself.
        level = float(timestep) or 1000.0 * sigma
        x0 = denoise(x, level)
        flow = (x - x0) * (1000.0 / level)
        x = scheduler.step(flow, timestep, x, return_dict=False)[0]
    return x


def rolling_window(
    denoise: Callable[[list[Tensor], list[float]], list[Tensor]],
    blocks: Sequence[Tensor],
    *,
    levels: Sequence[int],
    sigmas: Sequence[float],
    renoise: Renoise,
) -> list[Tensor]:
    """Denoise a window once and move every block to its next level (Rolling Forcing, arXiv:2509.25161).

    Args:
        denoise: (blocks, their timesteps) -> x0 of each, one joint estimate.
        blocks: Each (batch, frames, channels, height, width), cleanest first; one at the last level leaves clean.
        levels: Index into ``sigmas`` of each block.
        sigmas: Noise shares, falling; the timestep is 1000 times the share.
        renoise: Fresh noise for a block, by its index in the window.
    """
    estimates = denoise(list(blocks), [1000.0 * sigmas[level] for level in levels])
    return [
        _renoised(x0, renoise(index), sigmas[level + 1]) if level + 1 < len(sigmas) else x0
        for index, (x0, level) in enumerate(zip(estimates, levels, strict=True))
    ]


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """Validated settings of a one-block sampler."""

    name: ClassVar[str]  # key in YAML and on the command line
    source: ClassVar[str]  # paper or repository
    is_renoising: ClassVar[bool] = (
        False  # goes from level to level by ``_renoised`` alone: latents may be half precision
    )

    @abstractmethod
    def sample(self, denoise: Denoise, x: Tensor, *, renoise: Renoise, block_index: int) -> Tensor:
        """Turn Gaussian noise into the clean latents of a block, calling ``denoise`` ``num_steps`` times."""

    @abstractmethod
    def num_steps(self, block_index: int) -> int:
        """Denoising steps of a block."""

    @property
    def num_window_blocks(self) -> int:
        """Blocks that are denoised together; more than 1 in ``RollingWindow``."""
        return 1

    @property
    def guidance_scale(self) -> float:
        """Scale of classifier-free guidance; 1 runs the conditional branch alone."""
        return 1.0

    def settings(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"name": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


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
        _check_scales(flow_shift=self.flow_shift)
        _check_timesteps("timesteps", self.timesteps)
        if self.first_block_timesteps is not None:
            _check_timesteps("first_block_timesteps", self.first_block_timesteps)

    def sigmas(self, block_index: int) -> tuple[float, ...]:
        raw = (block_index == 0 and self.first_block_timesteps) or self.timesteps
        return tuple(shifted(timestep / 1000.0, self.flow_shift if self.warp else 1.0) for timestep in raw)

    def num_steps(self, block_index: int) -> int:
        return len(self.sigmas(block_index))

    def sample(self, denoise: Denoise, x: Tensor, *, renoise: Renoise, block_index: int) -> Tensor:
        return few_step(denoise, x, sigmas=self.sigmas(block_index), renoise=renoise)


@dataclass(frozen=True, kw_only=True)
class MultiStep(Sampler):
    """ODE sampling with classifier-free guidance (Self-Forcing's causal diffusion pipeline).

    Noise shares run evenly from ``max_sigma`` to 0, warped by ``flow_shift``; a new scheduler per block.
    """

    name: ClassVar[str] = "multi_step"
    source: ClassVar[str] = "Self-Forcing, arXiv:2506.08009; UniPC, arXiv:2302.04867"

    num_inference_steps: int = 50
    flow_shift: float = 5.0
    guidance_scale: float = 3.0
    solver: Literal["unipc", "euler"] = "unipc"
    max_sigma: float = 0.999  # UniPC's log-SNR is infinite at 1

    def __post_init__(self) -> None:
        _check_scales(flow_shift=self.flow_shift, guidance_scale=self.guidance_scale)
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={self.num_inference_steps} must be 1 or more.")
        if self.solver not in ("unipc", "euler"):
            raise ValueError(f"solver={self.solver!r} is unknown: use 'unipc' or 'euler'.")
        limit = 1.0 if self.solver == "euler" else 0.9999
        if not 0 < self.max_sigma <= limit:
            raise ValueError(f"max_sigma={self.max_sigma} must be above 0 and at most {limit} for {self.solver}.")

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler:
        """A fresh diffusers scheduler with this sampler's steps set."""
        raw = np.linspace(self.max_sigma, 0.0, self.num_inference_steps + 1)[:-1]
        if self.solver == "euler":
            scheduler = FlowMatchEulerDiscreteScheduler(shift=self.flow_shift)
            scheduler.set_timesteps(sigmas=raw.tolist())
            return scheduler
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, solver_order=2, solver_type="bh2"
        )
        sigmas: Any = np.array([shifted(u, self.flow_shift) for u in raw])  # a list, as annotated, is multiplied
        scheduler.set_timesteps(sigmas=sigmas)
        return scheduler

    def num_steps(self, block_index: int) -> int:
        return self.num_inference_steps

    def sample(self, denoise: Denoise, x: Tensor, *, renoise: Renoise, block_index: int) -> Tensor:
        return multi_step(denoise, x, scheduler=self.scheduler())


@dataclass(frozen=True, kw_only=True)
class RollingWindow(Sampler):
    """Joint denoising of as many blocks as there are steps (Rolling Forcing, arXiv:2509.25161).

    Once the window is full, every forward moves all its blocks one level further: the first one becomes clean and
    leaves, a block of pure noise enters behind. So a new prompt shows from the first block on that has not entered
    yet. ``timesteps`` are raw and warped by ``flow_shift``, as in ``few_step``. Unlike in the released code, blocks
    at the left of the first window are committed once, when they are clean.
    """

    name: ClassVar[str] = "rolling_window"
    source: ClassVar[str] = "Rolling Forcing, arXiv:2509.25161"
    is_renoising: ClassVar[bool] = True

    timesteps: tuple[float, ...] = (1000, 800, 600, 400, 200)
    flow_shift: float = 5.0
    guidance_scale: float = 1.0  # distilled models need none

    def __post_init__(self) -> None:
        _check_scales(flow_shift=self.flow_shift, guidance_scale=self.guidance_scale)
        _check_timesteps("timesteps", self.timesteps)

    @property
    def sigmas(self) -> tuple[float, ...]:
        return tuple(shifted(timestep / 1000.0, self.flow_shift) for timestep in self.timesteps)

    @property
    def num_window_blocks(self) -> int:
        return len(self.timesteps)

    def num_steps(self, block_index: int) -> int:
        return len(self.timesteps)

    def sample(self, denoise: Denoise, x: Tensor, *, renoise: Renoise, block_index: int) -> Tensor:
        return few_step(denoise, x, sigmas=self.sigmas, renoise=renoise)


def _check_timesteps(name: str, timesteps: Sequence[float]) -> None:
    falls = all(a > b for a, b in zip(timesteps, timesteps[1:], strict=False))
    if not timesteps or not falls or timesteps[0] > 1000 or timesteps[-1] <= 0:
        raise ValueError(
            f"{name}={list(timesteps)} must fall from at most 1000 and stay above 0, e.g. [1000, 750, 500, 250] "
            "(leave out a trailing 0)."
        )


def _check_scales(*, flow_shift: float, guidance_scale: float = 1.0) -> None:
    if not flow_shift > 0:
        raise ValueError(f"flow_shift={flow_shift} must be above 0; Wan and Self-Forcing use 5.0.")
    if guidance_scale < 0:
        raise ValueError(f"guidance_scale={guidance_scale} must be 0 or more; 1 turns guidance off.")


SAMPLERS: dict[str, type[Sampler]] = {cls.name: cls for cls in (FewStep, MultiStep, RollingWindow)}


def make_sampler(settings: Sampler | Mapping[str, Any] | str) -> Sampler:
    """Make a sampler from its YAML mapping.

    Args:
        settings: ``{"name": NAME, field: value, ...}``, a name alone (all defaults), or a sampler, which is returned.

    Raises:
        ValueError: If the name or a field is unknown, with the nearest known one, or a value does not fit.
    """
    return settings if isinstance(settings, Sampler) else make(SAMPLERS, settings, key="name", what="sampler")


class NoiseSource(Protocol):
    """Gaussian noise of a rollout, block by block.

    ``shape`` is (batch, frames, channels, height, width) and so is the answer. A source that ends (recorded noise)
    answers with zero frames, and the rollout ends there.
    """

    def initial(self, block_index: int, start_frame: int, shape: Sequence[int]) -> Tensor: ...

    def renoise(self, block_index: int, start_frame: int, step_index: int, shape: Sequence[int]) -> Tensor:
        """Fresh noise after denoising step ``step_index``."""
        ...


class SeededNoise(NoiseSource):
    """Standard normal noise on the CPU in float32, each sample of a batch from its own seed.

    Every draw has its own generator, keyed by a hash of (seed, block, step), so nothing depends on the order or the
    number of draws before it, on the batch, or on a resume. ``seeds`` has any Python integer for each sample.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = tuple(int(seed) for seed in seeds)

    def initial(self, block_index: int, start_frame: int, shape: Sequence[int]) -> Tensor:
        return self._draw(block_index, -1, shape)

    def renoise(self, block_index: int, start_frame: int, step_index: int, shape: Sequence[int]) -> Tensor:
        return self._draw(block_index, step_index, shape)

    def _draw(self, block_index: int, step_index: int, shape: Sequence[int]) -> Tensor:
        if shape[0] != len(self.seeds):
            raise ValueError(f"{len(self.seeds)} seeds for a batch of {shape[0]}: give one seed per sample.")
        generators = (torch.Generator().manual_seed(_key(seed, block_index, step_index)) for seed in self.seeds)
        return torch.stack([torch.randn(tuple(shape[1:]), generator=generator) for generator in generators])


def _key(seed: int, block_index: int, step_index: int) -> int:
    """63 well mixed bits of (seed, block, step)."""
    data = str(seed).encode() + struct.pack("<qq", block_index, step_index)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1
