"""Text to minutes of video, as a diffusers pipeline."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from longtake.attention import SparsePolicy
from longtake.cache import DEFAULT_POLICY, CachePolicy, Event, make_policy
from longtake.models import VaePixels
from longtake.pipelines.arguments import GivenNoise, chosen_sampler, noise_seeds, prompt_texts
from longtake.pipelines.given import GivenLatents
from longtake.pipelines.loading import ModelLoading
from longtake.pipelines.rollout import LatentRollout
from longtake.pipelines.take import Chunk, TakeSession
from longtake.pipelines.take_options import TakeOptions
from longtake.pipelines.video_start import make_start
from longtake.samplers import Sampler, SeededNoise

StepCallback = Callable[["LongVideoPipeline", int, float, dict[str, Any]], dict[str, Any] | None]

Schedule = Sequence[tuple[float, str | Sequence[str]] | tuple[float, str | Sequence[str], Event]]
"""(seconds, prompt) or (seconds, prompt, event) of later prompts, in order of time."""


@dataclass
class LongVideoPipelineOutput(BaseOutput):
    """A finished video.

    Attributes:
        frames: ``np``: (batch, frames, height, width, channels) float32 in [0, 1]; ``pt``: (batch, frames, channels,
            height, width); ``pil``: a list of images per sample; ``latent``: (batch, channels, latent frames,
            height, width), normalised.
    """

    frames: Any


class LongVideoPipeline(ModelLoading, TakeOptions, WanPipeline):
    """Rolls a causal Wan transformer out over minutes, block by block, with a cache policy.

    A ``WanPipeline`` with the same components, so folders, LoRA, offload and quantisation are diffusers' own.
    ``family`` holds what the checkpoint does not say of itself.
    """

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Write a stock ``WanPipeline`` folder that any diffusers tool opens.

        Raises:
            ValueError: If the text encoder is freed.
        """
        if self.text_encoder is None:
            raise ValueError("the text encoder is freed, and no folder opens without one: load the model again.")
        WanPipeline(**self.components).save_pretrained(save_directory, **kwargs)

    def start(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        seconds: float | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        cache: CachePolicy | Mapping[str, Any] | str | None = None,
        sampler: Sampler | Mapping[str, Any] | str | None = None,
        seed: int | Sequence[int] = 0,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        frames_per_block: int | None = None,
        schedule: Schedule = (),
        attention: SparsePolicy | Mapping[str, Any] | str = "dense",
        decode: bool = True,
        image: Any = None,
        video: Any = None,
        video_latents: Tensor | GivenLatents | None = None,
        include_start: bool = True,
    ) -> TakeSession:
        """Prepare a video without making any of it.

        Args:
            prompt: One text, or one per sample.
            negative_prompt: Used by samplers with guidance.
            seconds: Length; or give ``num_frames``. Rounded up to 1 + 4 k pixel frames.
            num_frames: Length in pixel frames.
            height: Pixels; the family's unless given.
            width: Pixels.
            cache: Policy, its mapping, or its name; the one that the family was trained with unless given, else
                the default one.
            sampler: Sampler, its mapping, or its name; the family's unless given.
            seed: One for all samples, or one per sample. A sample's video depends on its own prompt and seed alone.
            guidance_scale: Overrides the sampler's.
            num_inference_steps: Overrides a multi-step sampler's.
            latents: (batch, channels, latent frames, height, width) noise to start from instead of the seed's.
            prompt_embeds: (batch, text_len, text_dim) instead of ``prompt``.
            negative_prompt_embeds: Same shape, instead of ``negative_prompt``.
            frames_per_block: Overrides the family's.
            schedule: Later prompts, in order of time: (seconds, prompt) or (seconds, prompt, event), from the first
                block on that starts at or after that time; event: keep, recache, flush, cut, as far as the policy
                knows it.
            attention: Attention policy, its mapping (``backend`` may name an executor), or its name.
            decode: Whether chunks carry pixels.
            image: Go on from an image, or one per sample, with models that start from one; see ``clips.make_stills``.
            video: Go on from the end of a video, or of one per sample: a path, PIL images, an array or a tensor; see
                ``clips.make_clips``. It fills the cache under the policy; time, seeds and lengths count from its end.
            video_latents: Go on from latents: (batch, channels, latent frames, height, width), normalised.
            include_start: Whether what it goes on from comes out too, as the VAE decodes it, before the rest.

        Raises:
            ValueError: For any setting that does not fit, before any forward.
        """
        family = self.family
        block = frames_per_block or family.frames_per_block
        policy = make_policy((family.cache or DEFAULT_POLICY) if cache is None else cache)
        solver = chosen_sampler(family if sampler is None else sampler, guidance_scale, num_inference_steps)
        height, width = height or family.height, width or family.width
        frame_shape = self._frame_shape(height, width)
        first = family.first_block_frames or block
        prompts = prompt_texts(prompt, prompt_embeds)
        given = make_start(
            image=image,
            video=video,
            video_latents=video_latents,
            family=family,
            frames_per_block=block,
            vae=self.vae,
            processor=self.video_processor,
            height=height,
            width=width,
            batch_size=len(prompts),
        )
        num_given = 0 if given is None else given.num_frames
        num_frames = self.num_pixel_frames(seconds=seconds, num_frames=num_frames, goes_on=num_given > 0)
        wanted = 1 + (num_frames - 1) // self.vae_scale_factor_temporal
        begun = block if num_given else first
        num_latent_frames = begun + max(0, math.ceil((wanted - begun) / block)) * block
        policy.check(max(first, block), num_given + num_latent_frames)

        embeds = self.embed_text(prompts) if prompt_embeds is None else prompt_embeds
        if solver.guidance_scale != 1.0 and negative_prompt_embeds is None:
            negatives = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt or [""])
            negatives = negatives * len(prompts) if len(negatives) == 1 else negatives
            negative_prompt_embeds = self.embed_text(negatives, is_negative=True)
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one seed, or one per prompt.")
        rollout = LatentRollout(
            self.transformer,
            embeds,
            num_frames=num_latent_frames,
            frame_shape=frame_shape,
            frames_per_block=block,
            first_block_frames=family.first_block_frames,
            cache=policy,
            sampler=solver,
            noise=SeededNoise(seeds) if latents is None else GivenNoise(latents, seeds, num_given),
            initial_latents=given,
            context_timestep=family.context_timestep,
            negative_prompt_embeds=negative_prompt_embeds,
            pixels=VaePixels(self.vae),
            attention=attention,
            numerics=self.numerics,
        )
        session = TakeSession(
            self,
            rollout,
            prompts,
            num_frames=num_frames,
            fps=family.fps,
            decode=decode,
            include_start=include_start,
        )
        for at, text, *event in schedule:
            session.change_prompt(text, event=event[0] if event else "keep", at=at)
        return session

    def stream(self, prompt: str | Sequence[str] | None = None, **settings) -> Iterator[Chunk]:
        """Yield chunks as they are made; takes what ``start`` takes."""
        return iter(self.start(prompt, **settings))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        seconds: float | None = None,
        seed: int | Sequence[int] | None = None,
        cache: CachePolicy | Mapping[str, Any] | str | None = None,
        sampler: Sampler | Mapping[str, Any] | str | None = None,
        frames_per_block: int | None = None,
        schedule: Schedule = (),
        attention: SparsePolicy | Mapping[str, Any] | str = "dense",
        image: Any = None,
        video: Any = None,
        video_latents: Tensor | GivenLatents | None = None,
        include_start: bool = True,
    ) -> LongVideoPipelineOutput | tuple:
        """Make a whole video and return it; for anything longer than memory holds, use ``stream``.

        Args:
            prompt: See ``start``, as are all arguments not listed here.
            num_videos_per_prompt: Videos per prompt, with seeds seed, seed + 1, ...
            generator: Instead of ``seed``: one, or one per sample; each is asked for a seed.
            output_type: ``np``, ``pt``, ``pil`` or ``latent``.
            return_dict: Whether to return an output object or a tuple.
            callback_on_step_end: Called as (pipe, step_index, timestep, {"latents": x0}) after every denoising step,
                with x0 (batch, frames, channels, height, width); what it returns under "latents" replaces x0.
            callback_on_step_end_tensor_inputs: Which tensors the callback gets.

        Raises:
            ValueError: For any setting that does not fit, before any forward.
        """
        if output_type not in ("np", "pt", "pil", "latent"):
            raise ValueError(f"output_type={output_type!r} is unknown: use 'np', 'pt', 'pil' or 'latent'.")
        if num_videos_per_prompt < 1:
            raise ValueError(f"num_videos_per_prompt={num_videos_per_prompt} must be 1 or more.")
        unknown = set(callback_on_step_end_tensor_inputs) - {"latents", "prompt_embeds"}
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {sorted(unknown)}; known: latents, prompt_embeds."
            )
        prompts = None if prompt_embeds is not None else prompt_texts(prompt, None)
        if prompts is not None:
            prompts = [text for text in prompts for _ in range(num_videos_per_prompt)]
        batch = len(prompts) if prompts is not None else prompt_embeds.shape[0]
        session = self.start(
            prompts,
            negative_prompt=negative_prompt,
            seconds=seconds,
            num_frames=num_frames,
            height=height,
            width=width,
            cache=cache,
            sampler=sampler,
            seed=noise_seeds(seed, generator, batch, num_videos_per_prompt),
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            frames_per_block=frames_per_block,
            schedule=schedule,
            attention=attention,
            decode=output_type != "latent",
            image=image,
            video=video,
            video_latents=video_latents,
            include_start=include_start,
        )
        if callback_on_step_end is not None:
            session.rollout.on_step_end = self._on_step_end(callback_on_step_end, callback_on_step_end_tensor_inputs)
        parts = []
        with self.progress_bar(total=session.num_blocks) as bar:
            for chunk in session:
                parts.append(chunk.latents if output_type == "latent" else chunk.frames)
                bar.update(chunk.index >= 0)
        self.maybe_free_model_hooks()
        video = self._output(torch.cat(parts, dim=1), output_type)
        return LongVideoPipelineOutput(frames=video) if return_dict else (video,)

    def num_pixel_frames(
        self, *, seconds: float | None = None, num_frames: int | None = None, goes_on: bool = False
    ) -> int:
        """Length in pixel frames: 1 + 4 k, or 4 k behind a start, rounded up; 81 or 84 when nothing is given.

        Raises:
            ValueError: If both lengths are given, or one is not positive.
        """
        if seconds is not None and num_frames is not None:
            raise ValueError(f"seconds={seconds} and num_frames={num_frames}: give one of the two.")
        if seconds is not None:
            if not (seconds > 0 and math.isfinite(seconds)):
                raise ValueError(f"seconds={seconds} must be a number above 0.")
            num_frames = max(1, round(seconds * self.family.fps))
        num_frames = 81 if num_frames is None else num_frames
        if num_frames < 1:
            raise ValueError(f"num_frames={num_frames} must be 1 or more.")
        step = self.vae_scale_factor_temporal
        first = 0 if goes_on else 1
        return first + math.ceil((num_frames - first) / step) * step

    @torch.no_grad()
    def embed_text(self, prompts: Sequence[str], *, is_negative: bool = False) -> Tensor:
        """Encode prompts, each by itself, padded with zeros to the family's length.

        Returns:
            (batch, text_len, text_dim).

        Raises:
            ValueError: If a text is empty or longer than the encoder reads, or the encoder is freed.
        """
        limit = self.family.max_sequence_length
        for text in prompts:
            if not isinstance(text, str):
                raise ValueError(f"a prompt has to be text, not {type(text).__name__}.")
            if not text.strip() and not is_negative:
                raise ValueError("the prompt is empty: say what the video is to show.")
            num_tokens = len(self.tokenizer(text).input_ids)
            if num_tokens > limit:
                raise ValueError(
                    f"the prompt has {num_tokens} tokens, this model reads {limit}: shorten it "
                    f"(it begins {text[:40]!r})."
                )
        return torch.cat([self._embed(text) for text in prompts])

    def _frame_shape(self, height: int, width: int) -> tuple[int, int, int]:
        factor = self.vae_scale_factor_spatial
        _, patch_height, patch_width = self.transformer.config.patch_size
        for name, value, step in (("height", height, factor * patch_height), ("width", width, factor * patch_width)):
            if value < step or value % step:
                nearest = max(step, round(value / step) * step)
                raise ValueError(f"{name}={value} is not divisible by {step}: use {nearest}.")
        return self.transformer.config.in_channels, height // factor, width // factor

    def _on_step_end(
        self, callback: StepCallback, names: Sequence[str]
    ) -> Callable[[int, float, Tensor, Tensor], Tensor]:
        def on_step_end(step_index: int, timestep: float, x0: Tensor, prompt_embeds: Tensor) -> Tensor:
            values = {"latents": x0, "prompt_embeds": prompt_embeds}
            changed = callback(self, step_index, timestep, {name: values[name] for name in names})
            return changed.get("latents", x0) if changed else x0

        return on_step_end

    def _output(self, video: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return video.transpose(1, 2)
        if output_type == "pt":
            return video
        array = video.permute(0, 1, 3, 4, 2).cpu().numpy()
        if output_type == "np":
            return array
        return [self.video_processor.numpy_to_pil(np.ascontiguousarray(sample)) for sample in array]
