"""Text to minutes of video: a diffusers pipeline, and the video under way that it starts."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from longtake.cache import DEFAULT_POLICY, CacheStats, Event
from longtake.models import VaePixels
from longtake.pipelines.conditioning import ClipEncoder
from longtake.pipelines.loading import ModelLoading
from longtake.pipelines.rollout import Block, LatentRollout, under
from longtake.pipelines.settings import PromptSwitch, RolloutSettings, VideoSettings, takes_fields_of
from longtake.samplers import SeededNoise

logger = logging.getLogger(__name__)

StepCallback = Callable[["LongVideoPipeline", int, float, dict[str, Any]], dict[str, Any] | None]


@dataclass(frozen=True)
class VideoBlock:
    """A finished block as pixels."""

    index: int  # from 0; blocks of conditioning frames come before, and the last of them is -1
    start_frame: int  # first latent frame, conditioning latents counted
    frames: Tensor  # (batch, frames, channels, height, width) float32 in [0, 1]
    latents: Tensor  # (batch, latent frames, channels, height, width), normalised
    stats: CacheStats  # contents of the cache
    num_cache_bytes: int  # storage and read sets of all guidance branches
    seconds: Mapping[str, float]  # spent in ``denoise`` and ``decode``; ``observe`` where conditioning was taken in
    is_last: bool  # the video ends here
    prompt: tuple[str, ...]  # the prompts in force, one per sample

    def uint8(self) -> np.ndarray:
        """Frames as (batch, frames, height, width, channels) bytes, rounded."""
        return to_bytes(self.frames).cpu().numpy()


def to_bytes(frames: Tensor) -> Tensor:
    """(batch, frames, channels, height, width) in [0, 1] to bytes, rounded, channels last."""
    return frames.mul(255.0).round_().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()


def to_pixels(video: Tensor) -> Tensor:
    """(batch, channels, frames, height, width) in [-1, 1], as the VAE has it, to frames of float32 in [0, 1]."""
    return video.float().mul(0.5).add(0.5).clamp_(0.0, 1.0).transpose(1, 2)


@dataclass
class _PositionUse:
    """Positions of every block's reads; warns once when they leave the trained range.

    Attention sees distances only, so the largest distance within one read is what counts; those below the latent
    frames of the training clips are known to the model.
    """

    policy: str
    num_trained_frames: int
    lowest: float | None = None  # of the last read
    highest: float | None = None
    reach: float = 0.0  # largest distance so far

    def see(self, positions: tuple[float, float] | None) -> None:
        if positions is None:
            return
        trained = self.num_trained_frames - 1
        was_within = self.reach <= trained
        self.lowest, self.highest = positions
        self.reach = max(self.reach, self.highest - self.lowest)
        if was_within and self.reach > trained:
            logger.warning(
                "cache policy %r reads positions %g apart, this model was trained on clips of %d latent frames, which "
                "are at most %d apart: use a smaller context, or positions that do not grow.",
                self.policy,
                self.reach,
                self.num_trained_frames,
                trained,
            )

    def as_mapping(self) -> dict[str, Any]:
        numbers = {"lowest": self.lowest, "highest": self.highest, "largest_distance": self.reach}
        return numbers | {"trained_distance": self.num_trained_frames - 1}

    def load(self, saved: Mapping[str, Any]) -> None:
        self.lowest, self.highest, self.reach = saved["lowest"], saved["highest"], saved["largest_distance"]


class VideoRollout:
    """A video under way, made by ``LongVideoPipeline.start``: iterate for blocks, save and load between them.

    ``num_frames`` are the pixel frames to make, the last block's rest dropped; time 0 is where they begin. Iterating
    gives the conditioning frames first where ``include_start`` is set.
    """

    def __init__(
        self,
        pipe: "LongVideoPipeline",
        rollout: LatentRollout,
        prompts: Sequence[str],
        *,
        num_frames: int,
        decode: bool = True,
        include_start: bool = True,
    ) -> None:
        self.pipe = pipe
        self.rollout = rollout
        self.num_frames = num_frames
        self.fps = pipe.family.fps
        self.decode = decode
        self.include_start = include_start
        self.num_emitted_frames = 0
        self.positions = _PositionUse(rollout.policy.name, pipe.family.num_trained_frames)
        self._prompts = [tuple(prompts)]
        stream, self._pixels = pipe.pixel_stream()
        self._decoder = stream if decode else None

    @property
    def attention_density(self) -> float:
        """Share of self-attention that was computed so far; 1 where it is dense."""
        return self.rollout.attention_density

    @property
    def num_start_frames(self) -> int:
        """Conditioning frames, in pixel frames; 0 where the video begins with the prompt."""
        return self._place(self.rollout.num_given_frames)

    @property
    def num_blocks(self) -> int:
        r = self.rollout
        return r.next_index + max(0, -(-(r.end_frame - r.next_frame) // r.frames_per_block))

    @property
    def next_block_index(self) -> int:
        return self.rollout.next_index

    def __iter__(self) -> Iterator[VideoBlock]:
        while (block := self.next_block()) is not None:
            yield block

    def next_block(self) -> VideoBlock | None:
        for block in self.observe():
            if self.include_start:
                return block
        start = time.perf_counter()
        latents = self.rollout.next_block()
        if latents is None:
            return None
        block = self._decoded(latents, "denoise", start, num_frames=self.num_frames - self.num_emitted_frames)
        self.num_emitted_frames += block.frames.shape[1]
        return block

    def observe(self) -> Iterator[VideoBlock]:
        """Take in the conditioning frames, block by block, and yield them; nothing once all of them are in.

        They are decoded whether they are shown or not: the decoder goes on from them as the rollout does.
        """
        start = time.perf_counter()
        while (latents := self.rollout.next_given()) is not None:
            yield self._decoded(latents, "observe", start)
            start = time.perf_counter()

    def _decoded(self, block: Block, work: str, start: float, *, num_frames: int | None = None) -> VideoBlock:
        made = time.perf_counter()
        frames = self._decode(block.latents, num_frames)
        decoded = time.perf_counter()
        stats = self.rollout.stats()
        self.positions.see(stats.positions)
        return VideoBlock(
            index=block.index,
            start_frame=block.start_frame,
            frames=frames,
            latents=block.latents,
            stats=stats,
            num_cache_bytes=self.rollout.num_cache_bytes,
            seconds={work: made - start, "decode": decoded - made},
            is_last=self.rollout.next_frame >= self.rollout.end_frame,
            prompt=self._prompts[block.prompt_index + 1],
        )

    def check_change(self, prompt: str | Sequence[str], *, event: str = "keep") -> None:
        """Refuse a change of prompt that ``change_prompt`` would refuse whenever it comes.

        Raises:
            ValueError: If the text is empty or too long, or the policy or the sampler does not know the event.
        """
        self.rollout.settings.check_event(event)
        self.pipe.embed_text([prompt] if isinstance(prompt, str) else prompt)

    def change_prompt(self, prompt: str | Sequence[str], *, event: Event = "keep", at: float | None = None) -> int:
        """Switch to another prompt from the next block on, or later.

        Args:
            prompt: One text for all samples, or one per sample.
            event: Effect on the cache; see the policy.
            at: Seconds: the first block that starts at or after this time; None is the next one.

        Returns:
            Index of the block at which it takes effect.

        Raises:
            ValueError: If the text is empty or too long, the policy does not know the event, or ``at`` is before the
                next block or another change.
        """
        r = self.rollout
        r.settings.check_event(event)
        start = r.next_open_frame if at is None else self._latent_frame(at)
        # Between the starts of two blocks any time means the second.
        earliest = max([r.next_open_frame - r.frames_per_block + 1, *(switch.start_frame for switch in r.schedule)])
        if start < earliest:
            seconds = (self._place(earliest) - self.num_start_frames) / self.fps
            raise ValueError(f"a prompt change at {at} s is too late or out of order: {seconds:g} s is the earliest.")
        prompts = [prompt] * r.batch_size if isinstance(prompt, str) else list(prompt)
        index = r.add_switch(PromptSwitch(start, self.pipe.embed_text(prompts), event))
        self._prompts.append(tuple(prompts))
        return index

    def is_due(self, at: float) -> bool:
        """Tell if making the next block begins the first block that starts at or after a time, in seconds."""
        return self._latent_frame(at) <= self.rollout.last_opening_frame

    @property
    def num_ahead(self) -> int:
        """Blocks that are begun, at most, beyond the one that comes next."""
        return self.rollout.sampler.num_window_blocks - 1

    @property
    def prompt_changes(self) -> list[dict[str, Any]]:
        """Every change of prompt, those to come included, and the block at which it takes effect.

        ``{"block", "start_frame", "prompt", "event"}``, plain values; ``start_frame`` is the block's first latent
        frame.
        """
        changes = []
        for switch, prompts in zip(self.rollout.schedule, self._prompts[1:], strict=True):
            block = self.rollout.switch_index(switch)
            prompt = prompts[0] if len(set(prompts)) == 1 else list(prompts)
            where = {"block": block, "start_frame": self.rollout.start_of(block)}
            changes.append({**where, "prompt": prompt, "event": switch.event})
        return changes

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and values that fit into JSON: what a continuation needs beside the arguments of ``start``.

        Valid between blocks.
        """
        tensors, numbers = self.rollout.state_dict()
        tensors = {f"rollout.{key}": value for key, value in tensors.items()}
        switches = zip(self.rollout.schedule, self._prompts[1:], strict=True)
        state: dict[str, Any] = {
            "rollout": numbers,
            "num_emitted_frames": self.num_emitted_frames,
            "positions": self.positions.as_mapping(),
            "prompts": [{"frame": s.start_frame, "prompt": list(p), "event": s.event} for s, p in switches],
        }
        if self._decoder is not None:
            vae_tensors, state["decoder"] = self._decoder.state_dict()
            tensors |= {f"decoder.{key}": value for key, value in vae_tensors.items()}
        return tensors, state

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue a video that was started with the same arguments.

        Raises:
            ValueError: If the state does not belong to such a video.
        """
        for key in ("rollout", "num_emitted_frames", "positions", "prompts"):
            if key not in numbers:
                raise ValueError(f"the saved state has no {key!r}: it was not written by a video's rollout.")
        self.rollout.schedule.clear()
        del self._prompts[1:]
        for switch in numbers["prompts"]:
            embeds = self.pipe.embed_text(switch["prompt"])
            self.rollout.schedule.append(PromptSwitch(switch["frame"], embeds, switch["event"]))
            self._prompts.append(tuple(switch["prompt"]))
        self.rollout.load_state_dict(under("rollout.", tensors), numbers["rollout"])
        if self._decoder is not None:
            if "decoder" not in numbers:
                raise ValueError("the saved state has no 'decoder': it was written without pixels.")
            self._decoder.load_state_dict(under("decoder.", tensors), numbers["decoder"])
        self.num_emitted_frames = numbers["num_emitted_frames"]
        self.positions.load(numbers["positions"])

    def _latent_frame(self, seconds: float) -> int:
        """First latent frame whose pixels start at or after a time; the very first alone is one pixel frame."""
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"a prompt change at {seconds} s: give a time of 0 or more.")
        num_given, step = self.rollout.num_given_frames, self.pipe.vae_scale_factor_temporal
        if num_given:
            return num_given + math.ceil((seconds * self.fps - 1e-6) / step)
        return 0 if seconds == 0 else max(1, math.ceil((seconds * self.fps - 1e-6 - 1) / step) + 1)

    def _place(self, latent_frame: int) -> int:
        return 0 if latent_frame == 0 else 1 + (latent_frame - 1) * self.pipe.vae_scale_factor_temporal

    @torch.no_grad()
    def _decode(self, latents: Tensor, num_frames: int | None) -> Tensor:
        """(batch, frames, channels, height, width) latents to float32 pixels in [0, 1], the first so many of them."""
        if self._decoder is None:
            return latents.new_empty(latents.shape[0], 0, 3, 0, 0)
        video = self._decoder.decode(self._pixels.denormalise(latents))
        return to_pixels(video[:, :, :num_frames])


class _GivenNoise(SeededNoise):
    """Initial noise from the caller, (batch, channels, latent frames, height, width); fresh noise from seeds."""

    def __init__(self, latents: Tensor, seeds: Sequence[int], first_frame: int) -> None:
        super().__init__(seeds)
        self.first_frame = first_frame
        self.latents = latents.transpose(1, 2).cpu().float()

    def initial(self, block_index: int, start_frame: int, shape: Sequence[int]) -> Tensor:
        start = start_frame - self.first_frame
        return self.latents[:, start : start + shape[1]]


@dataclass
class LongVideoPipelineOutput(BaseOutput):
    """A finished video.

    ``frames`` are for ``np`` (batch, frames, height, width, channels) float32 in [0, 1]; for ``pt`` (batch, frames,
    channels, height, width); for ``pil`` a list of images per sample; for ``latent`` (batch, channels, latent frames,
    height, width), normalised.
    """

    frames: Any


class LongVideoPipeline(ModelLoading):
    """Rolls a causal Wan transformer out over minutes, block by block, with a cache policy.

    A ``WanPipeline`` with the same components, so folders, LoRA, offload and quantisation are diffusers' own.
    ``family`` holds what the checkpoint does not.
    """

    # Prompts that were encoded before the text encoder was freed; replaced, never changed.
    _embedded: dict[str, Tensor] = {}  # noqa: RUF012

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write a stock ``WanPipeline`` folder that any diffusers tool opens.

        Raises:
            ValueError: If the text encoder is freed.
        """
        if self.text_encoder is None:
            raise ValueError("the text encoder is freed, and no folder opens without one: load the model again.")
        WanPipeline(**self.components).save_pretrained(save_directory, **kwargs)

    @takes_fields_of(VideoSettings)
    def start(self, prompt: str | Sequence[str] | None = None, **settings: Any) -> VideoRollout:
        """Prepare a video without making any of it.

        Args:
            prompt: One text, or one per sample.
            **settings: Fields of ``longtake.pipelines.VideoSettings``.

        Raises:
            ValueError: For any setting that does not fit, before any forward.
        """
        s = VideoSettings(**settings)
        family = replace(self.family, frames_per_block=s.frames_per_block or self.family.frames_per_block)
        block, solver = family.frames_per_block, s.solver(family.sampler)
        size = {"height": s.height or family.height, "width": s.width or family.width}
        frame_shape = self._frame_shape(**size)
        prompts = s.prompts(prompt)
        batch_size = len(prompts)
        clips = ClipEncoder(vae=self.vae, processor=self.video_processor, batch_size=batch_size, family=family, **size)
        conditioning = clips.conditioning({"image": s.image, "video": s.video, "video_latents": s.video_latents})
        num_given = 0 if conditioning is None else conditioning.num_frames
        num_frames = self.num_pixel_frames(seconds=s.seconds, num_frames=s.num_frames, goes_on=num_given > 0)
        wanted = 1 + (num_frames - 1) // self.vae_scale_factor_temporal
        first = block if num_given else family.first_block_frames or block
        rollout_settings = RolloutSettings(
            num_frames=first + max(0, math.ceil((wanted - first) / block)) * block,
            frame_shape=frame_shape,
            frames_per_block=block,
            first_block_frames=family.first_block_frames,
            cache=(family.cache or DEFAULT_POLICY) if s.cache is None else s.cache,
            sampler=solver,
            context_timestep=family.context_timestep,
            attention=s.attention,
            numerics=self.numerics,
        )
        rollout_settings.check_length(num_given=num_given)
        seeds = s.seeds(batch_size)
        negative_embeds = s.negative_prompt_embeds
        if solver.guidance_scale != 1.0 and negative_embeds is None:
            negative_embeds = self.embed_text(s.negatives(batch_size), is_negative=True)
        rollout = LatentRollout(
            self.transformer,
            self.embed_text(prompts) if s.prompt_embeds is None else s.prompt_embeds,
            settings=rollout_settings,
            noise=SeededNoise(seeds) if s.latents is None else _GivenNoise(s.latents, seeds, num_given),
            initial_latents=conditioning,
            negative_prompt_embeds=negative_embeds,
            pixels=VaePixels(self.vae),
        )
        video = VideoRollout(
            self, rollout, prompts, num_frames=num_frames, decode=s.decode, include_start=s.include_start
        )
        for at, text, *event in s.schedule:
            video.change_prompt(text, event=event[0] if event else "keep", at=at)
        return video

    @takes_fields_of(VideoSettings)
    def stream(self, prompt: str | Sequence[str] | None = None, **settings: Any) -> Iterator[VideoBlock]:
        """Yield blocks as they are made; takes the arguments of ``start``."""
        return iter(self.start(prompt, **settings))

    @takes_fields_of(VideoSettings)
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
        seed: int | Sequence[int] | None = None,
        **settings: Any,
    ) -> LongVideoPipelineOutput | tuple:
        """Make a whole video and return it; for anything longer than memory holds, use ``stream``.

        Args:
            prompt: One text, or one per sample; for arguments not listed here see ``VideoSettings``.
            num_videos_per_prompt: Videos per prompt, with seeds seed, seed + 1, ...
            generator: Instead of ``seed``: one, or one per sample; each is asked for a seed.
            output_type: ``np``, ``pt``, ``pil`` or ``latent``.
            return_dict: Whether to return an output object or a tuple.
            callback_on_step_end: Called as (pipe, step_index, timestep, {"latents": x0}) after every denoising step,
                with x0 (batch, frames, channels, height, width); its result under "latents" replaces x0.
            callback_on_step_end_tensor_inputs: Tensors that the callback gets.

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
        settings |= {"negative_prompt": negative_prompt, "height": height, "width": width, "num_frames": num_frames}
        settings |= {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "latents": latents}
        settings |= {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        prompts = VideoSettings(prompt_embeds=prompt_embeds).prompts(prompt)
        prompts = [text for text in prompts for _ in range(num_videos_per_prompt if prompt_embeds is None else 1)]
        video = self.start(
            prompts if prompt_embeds is None else None,
            seed=_seeds(seed, generator, len(prompts), num_videos_per_prompt),
            decode=output_type != "latent",
            **settings,
        )
        if callback_on_step_end is not None:
            video.rollout.on_step_end = self._on_step_end(callback_on_step_end, callback_on_step_end_tensor_inputs)
        parts = []
        progress_bar: Any = self.progress_bar
        with progress_bar(total=video.num_blocks) as bar:
            for block in video:
                parts.append(block.latents if output_type == "latent" else block.frames)
                bar.update(block.index >= 0)
        self.maybe_free_model_hooks()
        frames = self._output(torch.cat(parts, dim=1), output_type)
        return LongVideoPipelineOutput(frames=frames) if return_dict else (frames,)

    def num_pixel_frames(
        self, *, seconds: float | None = None, num_frames: int | None = None, goes_on: bool = False
    ) -> int:
        """Length in pixel frames: 1 + 4 k, or 4 k behind conditioning frames, rounded up; 81 or 84 by default.

        Raises:
            ValueError: If both lengths are given, or one is not positive.
        """
        VideoSettings(seconds=seconds, num_frames=num_frames)
        if seconds is not None:
            num_frames = max(1, round(seconds * self.family.fps))
        num_frames = 81 if num_frames is None else num_frames
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

    def _embed(self, text: str) -> Tensor:
        """(1, text_len, text_dim) of a text that has been checked."""
        if text in self._embedded:
            return self._embedded[text]
        if self.text_encoder is None:
            raise ValueError(
                f"the text encoder is freed and never read the prompt {text[:60]!r}: give it to free_text_encoder "
                "with the others, or load the model again."
            )
        limit = self.family.max_sequence_length
        return self.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=limit)[0]

    def free_text_encoder(self, prompts: Sequence[str] = ()) -> None:
        """Encode prompts, keep what came out, and let the text encoder go.

        From then on only these prompts, and the empty one, can be shown; a video under way keeps those that it has.
        ``prompts`` are first, negative and later ones, and those of checkpoints to be loaded.

        Raises:
            ValueError: If a prompt is empty or too long, or the encoder is gone and a prompt is not known.
        """
        texts = list(dict.fromkeys(["", *prompts]))
        known = {text: self.embed_text([text], is_negative=not text).cpu() for text in texts}
        self._embedded = self._embedded | known
        self.text_encoder = None
        # Offloading chains the components to each other and would keep the encoder alive.
        self.maybe_free_model_hooks()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

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


def _seeds(
    seed: int | Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    batch_size: int,
    num_videos_per_prompt: int,
) -> list[int]:
    """One seed per video: given, asked of generators, or drawn."""
    if seed is not None and generator is not None:
        raise ValueError("give either seed or generator.")
    if generator is not None:
        generators = [generator] * batch_size if isinstance(generator, torch.Generator) else list(generator)
        return [int(torch.randint(2**62, (1,), generator=g, device=g.device)) for g in generators]
    if seed is None:
        return [int(torch.randint(2**62, (1,))) for _ in range(batch_size)]
    if isinstance(seed, int):
        return [seed + index % num_videos_per_prompt for index in range(batch_size)]
    return list(seed)
