"""Latents from a transformer and a cache policy alone."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffusers import WanTransformer3DModel
from torch import Tensor

from longtake.attention import SparsePolicy
from longtake.cache import EXACT_POLICY, CachePolicy
from longtake.models.upstream import Numerics
from longtake.pipelines.branches import Pixels
from longtake.pipelines.given import GivenLatents
from longtake.pipelines.prompts import PromptSwitch
from longtake.pipelines.rollout import Block, LatentRollout
from longtake.samplers import NoiseSource, Sampler


def rollout_latents(
    transformer: WanTransformer3DModel,
    prompt_embeds: Tensor,
    *,
    num_frames: int = 21,
    frame_shape: Sequence[int] = (16, 60, 104),
    frames_per_block: int = 3,
    first_block_frames: int | None = None,
    cache: CachePolicy | Mapping[str, Any] | str = EXACT_POLICY,
    sampler: Sampler | Mapping[str, Any] | str = "few_step",
    noise: NoiseSource,
    initial_latents: Tensor | GivenLatents | None = None,
    context_timestep: float = 0,
    schedule: Sequence[tuple[int, Tensor, str]] = (),
    negative_prompt_embeds: Tensor | None = None,
    pixels: Pixels | None = None,
    attention: SparsePolicy | Mapping[str, Any] | str = "dense",
    numerics: Numerics = "native",
) -> Iterator[Block]:
    """Roll a transformer out over latent frames, without text and pixels.

    Args:
        transformer: Any ``WanTransformer3DModel``; stock again whenever a block is yielded.
        prompt_embeds: (batch, text_len, text_dim), fed to the transformer's text embedder as they are.
        num_frames: Latent frames to generate, beyond ``initial_latents``; whole blocks.
        frame_shape: (channels, height, width) of a latent frame.
        frames_per_block: Latent frames denoised together.
        first_block_frames: Frames of the very first block, where it differs (1 in frame-first models).
        cache: Policy, its mapping, or its name.
        sampler: Sampler, its mapping, or its name.
        noise: Where noise comes from; a source that ends (zero frames) ends the rollout.
        initial_latents: (batch, frames, channels, height, width): they fill the cache at timestep 0, block by block;
            or a stream that makes them as they are taken, so that their number has no limit.
        context_timestep: Timestep of the commit pass; no noise is added.
        schedule: (start_frame, prompt_embeds, event) prompt switches; event: keep, recache, flush, cut.
        negative_prompt_embeds: For samplers with guidance; zeros when not given.
        pixels: Pools latents by way of pixels, for policies that ask for it; ``models.VaePixels`` does.
        attention: Attention policy, its mapping (``backend`` may name an executor), or its name.
        numerics: ``native``, or ``upstream``: half precision is rounded where Self-Forcing's code rounds it.

    Yields:
        Blocks in order.

    Raises:
        ValueError: For settings that do not fit each other, before any forward.
    """
    rollout = LatentRollout(
        transformer,
        prompt_embeds,
        num_frames=num_frames,
        frame_shape=frame_shape,
        frames_per_block=frames_per_block,
        first_block_frames=first_block_frames,
        cache=cache,
        sampler=sampler,
        noise=noise,
        initial_latents=initial_latents,
        context_timestep=context_timestep,
        schedule=[PromptSwitch(*entry) for entry in schedule],
        negative_prompt_embeds=negative_prompt_embeds,
        pixels=pixels,
        attention=attention,
        numerics=numerics,
    )
    return iter(rollout)
