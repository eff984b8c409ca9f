"""The sampler of undistilled models: many small steps of an ODE solver, with classifier-free guidance."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from longtake.samplers.base import Denoise, Renoise, Sampler, shifted
from longtake.samplers.few_step import check_flow_shift

Scheduler = FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler


def multi_step(denoise: Denoise, x: Tensor, *, scheduler: Scheduler) -> Tensor:
    """Follow the flow with a diffusers scheduler whose steps are set.

    Args:
        denoise: (x, timestep) -> x0.
        x: (batch, frames, channels, height, width), Gaussian noise.
        scheduler: Fresh: its multi-step history must be empty.

    Returns:
        Clean latents.
    """
    scheduler.set_begin_index(0)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):
        # UniPC's timesteps are whole numbers, as in the original code; a share that rounds to 0 stays itself.
        level = float(timestep) or 1000.0 * sigma
        x0 = denoise(x, level)
        flow = (x - x0) * (1000.0 / level)
        x = scheduler.step(flow, timestep, x, return_dict=False)[0]
    return x


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
        check_flow_shift(self.flow_shift)
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={self.num_inference_steps} must be 1 or more.")
        if self.guidance_scale < 0:
            raise ValueError(f"guidance_scale={self.guidance_scale} must be 0 or more; 1 turns guidance off.")
        if self.solver not in ("unipc", "euler"):
            raise ValueError(f"solver={self.solver!r} is unknown: use 'unipc' or 'euler'.")
        limit = 1.0 if self.solver == "euler" else 0.9999
        if not 0 < self.max_sigma <= limit:
            raise ValueError(f"max_sigma={self.max_sigma} must be above 0 and at most {limit} for {self.solver}.")

    def scheduler(self) -> Scheduler:
        """A fresh diffusers scheduler with this sampler's steps set."""
        raw = np.linspace(self.max_sigma, 0.0, self.num_inference_steps + 1)[:-1]
        if self.solver == "euler":
            scheduler = FlowMatchEulerDiscreteScheduler(shift=self.flow_shift)
            scheduler.set_timesteps(sigmas=raw.tolist())
            return scheduler
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, solver_order=2, solver_type="bh2"
        )
        scheduler.set_timesteps(sigmas=np.array([shifted(u, self.flow_shift) for u in raw]))
        return scheduler

    def num_steps(self, block_index: int) -> int:
        """Denoising steps of a block."""
        return self.num_inference_steps

    def sample(self, denoise: Denoise, x: Tensor, *, renoise: Renoise, block_index: int) -> Tensor:
        """Turn a block of noise into clean latents."""
        return multi_step(denoise, x, scheduler=self.scheduler())
