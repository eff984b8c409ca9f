"""The rollout: blocks of latents, one after the other, each seeing what the cache policy kept of those before it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from longtake.cache import EXACT_POLICY, BlockTrace, CachePolicy, CacheStats, Pass, make_policy
from longtake.models.causal import CausalTransformer, Segment
from longtake.models.threads import fitting_threads
from longtake.pipelines.branches import Branches, Pending, Pixels
from longtake.pipelines.prompts import PromptSwitch, check_event, strongest
from longtake.samplers import NoiseSource, Sampler, make_sampler

StepHook = Callable[[int, float, Tensor, Tensor], Tensor]
"""(step_index, timestep, x0, prompt_embeds) -> x0, after every denoising step."""

# Above this many tokens per forward the matmuls are large enough alone, and per-token modulation costs more memory
# than one forward less is worth.
MERGE_LIMIT = 4096


@dataclass(frozen=True)
class Block:
    """A finished block.

    Attributes:
        index: From 0, given latents not counted.
        start_frame: First latent frame in the video, given latents counted.
        latents: (batch, frames, channels, height, width), clean, normalised.
        prompt_index: Which entry of the schedule it was made with; -1 is the first prompt.
    """

    index: int
    start_frame: int
    latents: Tensor
    prompt_index: int = -1


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
    initial_latents: Tensor | None = None,
    context_timestep: float = 0,
    schedule: Sequence[tuple[int, Tensor, str]] = (),
    negative_prompt_embeds: Tensor | None = None,
    pixels: Pixels | None = None,
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
        initial_latents: (batch, frames, channels, height, width): they fill the cache at timestep 0, block by block.
        context_timestep: Timestep of the commit pass; no noise is added.
        schedule: (start_frame, prompt_embeds, event) prompt switches; event: keep, recache, flush, cut.
        negative_prompt_embeds: For samplers with guidance; zeros when not given.
        pixels: Pools latents by way of pixels, for policies that ask for it; ``models.VaePixels`` does.

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
    )
    return iter(rollout)


class LatentRollout:
    """A rollout that can be stopped between blocks, saved, and continued.

    Takes the arguments of ``rollout_latents``; ``schedule`` holds ``PromptSwitch`` entries and is extended by
    ``add_switch`` while the rollout runs. A block's commit shares one forward with the next block's first denoising
    pass where that pays (``merge_commit``); the last block is never committed. ``on_step_end`` may be set to watch or
    change every estimate of a clean block.
    """

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        prompt_embeds: Tensor,
        *,
        num_frames: int,
        frame_shape: Sequence[int],
        frames_per_block: int = 3,
        first_block_frames: int | None = None,
        cache: CachePolicy | Mapping[str, Any] | str = EXACT_POLICY,
        sampler: Sampler | Mapping[str, Any] | str = "few_step",
        noise: NoiseSource,
        initial_latents: Tensor | None = None,
        context_timestep: float = 0,
        schedule: Sequence[PromptSwitch] = (),
        negative_prompt_embeds: Tensor | None = None,
        pixels: Pixels | None = None,
        merge_commit: bool | None = None,
    ) -> None:
        self.causal = CausalTransformer(transformer)
        self.policy, self.sampler = make_policy(cache), make_sampler(sampler)
        self.frames_per_block = frames_per_block
        self.first_block_frames = first_block_frames or frames_per_block
        self.frame_shape = tuple(frame_shape)
        self.noise = noise
        self.context_timestep = float(context_timestep)
        self.schedule = list(schedule)
        self.batch_size = prompt_embeds.shape[0]
        self._num_given = 0 if initial_latents is None else initial_latents.shape[1]
        self._check(num_frames, initial_latents, frames_per_block, first_block_frames)
        self._check_policy(pixels)
        self.end_frame = self._num_given + num_frames
        geometry = self.causal.geometry(
            frame_shape, frames_per_block=frames_per_block, batch_size=self.batch_size, max_frames=self.end_frame
        )
        self.policy.check(max(self.first_block_frames, frames_per_block), self.end_frame)
        tokens = geometry.tokens_per_frame * frames_per_block
        self.merge_commit = 2 * tokens <= MERGE_LIMIT if merge_commit is None else merge_commit

        embeds = [prompt_embeds]
        if self.sampler.guidance_scale != 1.0:
            if negative_prompt_embeds is None:
                negative_prompt_embeds = torch.zeros_like(prompt_embeds)
            embeds.append(negative_prompt_embeds)
        self.branches = Branches(
            self.causal,
            self.policy,
            geometry,
            embeds=embeds,
            guidance_scale=self.sampler.guidance_scale,
            pixels=pixels,
            context_timestep=self.context_timestep,
        )
        self._first_prompt = prompt_embeds
        self._initial_latents = initial_latents
        self._next_frame = self._num_given
        self._next_index = 0
        self._prompt_index = -1
        self.on_step_end: StepHook | None = None

    def __iter__(self) -> Iterator[Block]:
        """Yield the blocks that are still to be made."""
        while (block := self.next_block()) is not None:
            yield block

    @torch.no_grad()
    def next_block(self) -> Block | None:
        """Make the next block, or None at the end of the rollout."""
        if self._next_frame >= self.end_frame:
            return None
        start, index = self._next_frame, self._next_index
        num_frames = self.frames_per_block if start else self.first_block_frames
        shape = (self.batch_size, num_frames, *self.frame_shape)
        x = self.noise.initial(index, start, shape)
        if x.shape[1] == 0:
            self.end_frame = start
            return None
        x = self._checked_noise(x, shape)

        geometry = self.branches.caches[0].geometry
        width = geometry.num_heads * geometry.head_dim
        num_tokens = self.batch_size * num_frames * geometry.tokens_per_frame
        with (
            self.causal.installed(),
            fitting_threads(width=width, num_tokens=num_tokens, device=self.causal.device),
        ):
            self._fill()
            self._switch_prompt(start)
            if not (self.merge_commit and self.branches.can_merge(num_frames)):
                self.branches.commit_pending()
            step_index = 0

            def denoise(x: Tensor, timestep: float) -> Tensor:
                nonlocal step_index
                pass_ = Pass("denoise", self._block_id(start), start, num_frames, step_index)
                x0 = x - (timestep / 1000.0) * self.branches.guided_flow(x, Segment(pass_, float(timestep)))
                if self.on_step_end is not None:
                    x0 = self.on_step_end(step_index, timestep, x0, self.branches.prompts[0].embeds)
                step_index += 1
                return x0

            def renoise(step: int) -> Tensor:
                return self._checked_noise(self.noise.renoise(index, start, step, shape), shape)

            latents = self.sampler.sample(denoise, x, renoise=renoise, block_index=index)

        self.branches.pending = Pending(BlockTrace(self._block_id(start), start, latents), self.context_timestep)
        self._next_frame, self._next_index = start + num_frames, index + 1
        return Block(index, start, latents, self._prompt_index)

    def add_switch(self, switch: PromptSwitch) -> int:
        """Extend the schedule.

        Returns:
            Index of the block at which the switch takes effect.

        Raises:
            ValueError: If the policy does not know the event.
        """
        check_event(self.policy, switch.event)
        self.schedule.append(switch)
        return self.switch_index(switch)

    def switch_index(self, switch: PromptSwitch) -> int:
        """Index of the block at which a switch takes effect, given latents not counted."""
        index = self._block_id(max(switch.start_frame, self._num_given)) - self._block_id(self._num_given)
        return index + (self.start_of(index) < switch.start_frame)

    def start_of(self, index: int) -> int:
        """First latent frame of a block, given latents not counted in ``index``."""
        block = index + self._block_id(self._num_given)
        return self.first_block_frames + (block - 1) * self.frames_per_block if block else 0

    def stats(self) -> CacheStats:
        """What the conditional branch's cache holds."""
        return self.branches.caches[0].stats()

    @property
    def num_cache_bytes(self) -> int:
        """Bytes of all branches' storage and read sets."""
        return sum(cache.stats().num_bytes + cache.num_scratch_bytes for cache in self.branches.caches)

    @property
    def next_frame(self) -> int:
        """First latent frame of the next block."""
        return self._next_frame

    @property
    def next_open_frame(self) -> int:
        """First latent frame of the next block that is not begun: a new prompt shows from here on."""
        return self._next_frame

    @property
    def next_index(self) -> int:
        """Index of the next block."""
        return self._next_index

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a continuation needs beside the constructor's arguments.

        Returns:
            Tensors, and plain numbers that fit into JSON. Valid between blocks.
        """
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {
            "next_frame": self._next_frame,
            "next_index": self._next_index,
            "prompt_index": self._prompt_index,
        }
        if (pending := self.branches.pending) is not None:
            tensors["pending.latents"] = pending.trace.latents
            numbers["pending.block_index"] = pending.trace.block_index
            numbers["pending.start_frame"] = pending.trace.start_frame
        for branch, cache in enumerate(self.branches.caches):
            for key, value in cache.state_dict().items():
                (tensors if isinstance(value, Tensor) else numbers)[f"cache.{branch}.{key}"] = value
        return tensors, numbers

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue where another rollout with the same arguments was saved.

        Raises:
            ValueError: If the state does not belong to such a rollout.
        """
        for key in ("next_frame", "next_index", "prompt_index"):
            if key not in numbers:
                raise ValueError(f"the saved state has no {key!r}: it was not written by a rollout.")
        merged = {**tensors, **numbers}
        for branch, cache in enumerate(self.branches.caches):
            prefix = f"cache.{branch}."
            cache.load_state_dict({k.removeprefix(prefix): v for k, v in merged.items() if k.startswith(prefix)})
        self._next_frame, self._next_index = numbers["next_frame"], numbers["next_index"]
        self.branches.pending = None
        if "pending.latents" in tensors:
            trace = BlockTrace(
                numbers["pending.block_index"],
                numbers["pending.start_frame"],
                tensors["pending.latents"].to(self.causal.device),
            )
            self.branches.pending = Pending(trace, self.context_timestep)
        self._prompt_index = numbers["prompt_index"]
        embeds = self._first_prompt if self._prompt_index < 0 else self.schedule[self._prompt_index].prompt_embeds
        self.branches.take_prompt(embeds)

    def _fill(self) -> None:
        """Commit the given latents, block by block, at timestep 0; the last block waits, as any other does."""
        if self._initial_latents is None or self._next_index:
            return
        latents = self._initial_latents.to(self.causal.device, torch.float32)
        start = 0
        while start < latents.shape[1]:
            self.branches.commit_pending()
            num_frames = self.frames_per_block if start else self.first_block_frames
            trace = BlockTrace(self._block_id(start), start, latents[:, start : start + num_frames])
            self.branches.pending = Pending(trace, 0.0)
            start += num_frames

    def _switch_prompt(self, start_frame: int) -> None:
        """Take the prompt in force at a frame; the block before belongs to the old one and is committed with it."""
        due = self._prompt_index + 1
        while due < len(self.schedule) and self.schedule[due].start_frame <= start_frame:
            due += 1
        switches = self.schedule[self._prompt_index + 1 : due]
        if switches:
            event = strongest([switch.event for switch in switches])
            self.branches.commit_pending(event=event, embeds=switches[-1].prompt_embeds)
            self._prompt_index = due - 1

    def _block_id(self, start_frame: int) -> int:
        """Index of a block in the video, given latents counted."""
        first = self.first_block_frames
        return 0 if start_frame < first else 1 + (start_frame - first) // self.frames_per_block

    def _checked_noise(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tuple(x.shape) != shape:
            raise ValueError(f"the noise source gave shape {tuple(x.shape)} where {shape} was asked for.")
        return x.to(self.causal.device, torch.float32)

    def _check(
        self, num_frames: int, initial_latents: Tensor | None, frames_per_block: int, first_block_frames: int | None
    ) -> None:
        for name, value in (("num_frames", num_frames), ("frames_per_block", frames_per_block)):
            if value < 1:
                raise ValueError(f"{name}={value} must be 1 or more.")
        if first_block_frames is not None and first_block_frames < 1:
            raise ValueError(f"first_block_frames={first_block_frames} must be 1 or more, or None.")
        first, given = self.first_block_frames, self._num_given
        if given and (given < first or (given - first) % frames_per_block):
            raise ValueError(
                f"initial_latents has {given} frames, which is no whole number of blocks: "
                f"use {first} frames plus a multiple of {frames_per_block}."
            )
        total = given + num_frames
        if total < first or (total - first) % frames_per_block:
            nearest = first + max(0, round((total - first) / frames_per_block)) * frames_per_block
            raise ValueError(
                f"num_frames={num_frames} is no whole number of blocks of {frames_per_block} frames "
                f"(first block {first}, {given} given): use {max(nearest - given, frames_per_block)}."
            )
        if initial_latents is not None:
            wanted = (self.batch_size, given, *self.frame_shape)
            if tuple(initial_latents.shape) != wanted:
                raise ValueError(f"initial_latents has shape {tuple(initial_latents.shape)}, expected {wanted}.")

    def _check_policy(self, pixels: Pixels | None) -> None:
        for switch in self.schedule:
            check_event(self.policy, switch.event)
        if self.policy.needs_vae and pixels is None:
            raise ValueError(
                f"cache policy {self.policy.name!r} pools pixels with these settings and needs a VAE: "
                "give pixels, or use LongVideoPipeline."
            )
