"""What a pipeline's arguments mean: prompts, seeds, samplers and noise in the several forms that users give them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from longtake.configs.families import ModelFamily
from longtake.samplers import Sampler, SeededNoise, make_sampler


class GivenNoise(SeededNoise):
    """Initial noise from the caller, fresh noise from seeds.

    Args:
        latents: (batch, channels, latent frames, height, width).
        seeds: One per sample.
        first_frame: Latent frame of the video that the first of them belongs to.
    """

    def __init__(self, latents: Tensor, seeds: Sequence[int], first_frame: int = 0) -> None:
        super().__init__(seeds)
        self.first_frame = first_frame
        self.latents = latents.transpose(1, 2).cpu().float()

    def initial(self, block_index: int, start_frame: int, shape: Sequence[int]) -> Tensor:
        """The caller's noise of these frames."""
        start = start_frame - self.first_frame
        return self.latents[:, start : start + shape[1]]


def prompt_texts(prompt: str | Sequence[str] | None, prompt_embeds: Tensor | None) -> list[str]:
    """The texts, one per sample; empty ones where embeddings are given.

    Raises:
        ValueError: If both are given, or none.
    """
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("give either prompt or prompt_embeds.")
    if prompt_embeds is not None:
        return [""] * prompt_embeds.shape[0]
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not texts:
        raise ValueError("the list of prompts is empty.")
    return texts


def chosen_sampler(
    settings: ModelFamily | Sampler | Mapping[str, Any] | str,
    guidance_scale: float | None,
    num_inference_steps: int | None,
) -> Sampler:
    """The family's sampler, or another one, with what the call changes of it."""
    sampler = make_sampler(settings.sampler if isinstance(settings, ModelFamily) else settings)
    changes = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
    changes = {name: value for name, value in changes.items() if value is not None}
    return make_sampler(sampler.settings() | changes) if changes else sampler


def noise_seeds(
    seed: int | Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    batch: int,
    num_videos_per_prompt: int,
) -> list[int]:
    """One seed per video: given, asked of generators, or drawn.

    Raises:
        ValueError: If both a seed and a generator are given.
    """
    if seed is not None and generator is not None:
        raise ValueError("give either seed or generator.")
    if generator is not None:
        generators = [generator] * batch if isinstance(generator, torch.Generator) else list(generator)
        return [int(torch.randint(2**62, (1,), generator=g, device=g.device)) for g in generators]
    if seed is None:
        return [int(torch.randint(2**62, (1,))) for _ in range(batch)]
    if isinstance(seed, int):
        return [seed + index % num_videos_per_prompt for index in range(batch)]
    return list(seed)
