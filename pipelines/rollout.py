"""The rollout: blocks of latents, one after the other, each seeing what the cache policy kept of those before it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from longtake.attention import SparsePolicy
from longtake.attention.density import DensityMeter
from longtake.cache import EXACT_POLICY, BlockTrace, CachePolicy, CacheStats, Geometry, Pass, make_policy
from longtake.models.causal import CausalTransformer, Segment
from longtake.models.sparse_attention import AttentionSetting, SparseSelfAttention
from longtake.models.threads import fitting_threads
from longtake.models.upstream import Numerics
from longtake.pipelines.branches import Branches, Pending, Pixels, unshared
from longtake.pipelines.checks import check_attention, check_blocks, check_policy, check_rounding, check_switch
from longtake.pipelines.given import GivenLatents, given_latents
from longtake.pipelines.prompts import PromptSwitch, strongest
from longtake.pipelines.window import OpenBlock, RollingBlocks
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
        index: From 0; blocks of given latents come before, -1 the last of them.
        start_frame: First latent frame in the video, given latents counted.
        latents: (batch, frames, channels, height, width), clean, normalised.
        prompt_index: Which entry of the schedule it was made with; -1 is the first prompt.
    """

    index: int
    start_frame: int
    latents: Tensor
    prompt_index: int = -1


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
        initial_latents: Tensor | GivenLatents | None = None,
        context_timestep: float = 0,
        schedule: Sequence[PromptSwitch] = (),
        negative_prompt_embeds: Tensor | None = None,
        pixels: Pixels | None = None,
        merge_commit: bool | None = None,
        attention: AttentionSetting | SparsePolicy | Mapping[str, Any] | str = "dense",
        numerics: Numerics = "native",
    ) -> None:
        self.causal = CausalTransformer(transformer, numerics=numerics)
        self.policy, self.sampler = make_policy(cache), make_sampler(sampler)
        self.attention = attention if isinstance(attention, AttentionSetting) else AttentionSetting(attention)
        self._meter = DensityMeter(self.attention.policy)
        self.frames_per_block = frames_per_block
        self.first_block_frames = first_block_frames or frames_per_block
        self.frame_shape = tuple(frame_shape)
        self.noise = noise
        self.context_timestep = float(context_timestep)
        self.schedule = list(schedule)
        self.batch_size = prompt_embeds.shape[0]
        self._given = given_latents(initial_latents, batch_size=self.batch_size, frame_shape=self.frame_shape)
        self._num_given = 0 if self._given is None else self._given.num_frames
        check_blocks(num_frames, frames_per_block, first_block_frames, self._num_given)
        check_policy(self.policy, self.sampler, has_pixels=pixels is not None)
        check_attention(self.policy, self.attention)
        check_rounding(self.sampler, numerics)
        for switch in self.schedule:
            check_switch(self.policy, self.sampler, switch.event)
        self.end_frame = self._num_given + num_frames
        geometry = self.causal.geometry(
            frame_shape, frames_per_block=frames_per_block, batch_size=self.batch_size, max_frames=self.end_frame
        )
        self.policy.check(self._num_joint_frames, self.end_frame)
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
            sparse=lambda: self._sparse_attention(geometry),
        )
        self.window = RollingBlocks(self.sampler) if self.sampler.num_window_blocks > 1 else None
        self._first_prompt = prompt_embeds
        self._next_given_frame = 0
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
        with self._at_work():
            block = self._one_block() if self.window is None else self._leaving_block(self.window)
        if block is None:
            return None
        trace = BlockTrace(self._block_id(block.start_frame), block.start_frame, block.latents)
        self.branches.pending = Pending(trace, self.context_timestep)
        self._next_frame, self._next_index = block.start_frame + block.latents.shape[1], block.index + 1
        return block

    @torch.no_grad()
    def next_given(self) -> Block | None:
        """Take in the next block of the given latents, or None once all are in; ``next_block`` takes in the rest."""
        with self._at_work():
            return self._take_given()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        geometry = self.branches.caches[0].geometry
        width = geometry.num_heads * geometry.head_dim
        num_tokens = self.batch_size * self._num_joint_frames * geometry.tokens_per_frame
        with (
            self.causal.installed(),
            fitting_threads(width=width, num_tokens=num_tokens, device=self.causal.device),
        ):
            yield

    def _one_block(self) -> Block | None:
        """Denoise the next block by itself."""
        start, index = self._next_frame, self._next_index
        x = self._noise(index, start)
        if x is None:
            return None
        num_frames = x.shape[1]
        self._fill()
        self._switch_prompt(start)
        if not (self.merge_commit and self.branches.can_merge(num_frames)):
            self.branches.commit_pending()
        step_index = 0

        def denoise(x: Tensor, timestep: float) -> Tensor:
            nonlocal step_index
            pass_ = Pass("denoise", self._block_id(start), start, num_frames, step_index)
            flow = self.branches.guided_flow(x, Segment(pass_, float(timestep)))
            x0 = self._step_ended(step_index, timestep, self.causal.clean(x, flow, timestep))
            step_index += 1
            return x0

        def renoise(step: int) -> Tensor:
            return self._checked_noise(self.noise.renoise(index, start, step, x.shape), tuple(x.shape))

        latents = self.sampler.sample(denoise, x, renoise=renoise, block_index=index)
        return Block(index, start, latents, self._prompt_index)

    def _leaving_block(self, window: RollingBlocks) -> Block | None:
        """Denoise the window until its first block is clean, letting a block in before every forward."""

        def denoise(parts: list[Tensor], timesteps: list[float]) -> list[Tensor]:
            x, first = torch.cat(parts, dim=1), window.blocks[0].start_frame
            pass_ = Pass("denoise", self._block_id(first), first, x.shape[1])
            flow = self.branches.guided_flow(x, Segment(pass_, window.frame_timesteps(timesteps)))
            flows = flow.split([part.shape[1] for part in parts], dim=1)
            steps = zip(window.blocks, parts, timesteps, flows, strict=True)
            return [self._step_ended(b.level, t, self.causal.clean(part, f, t)) for b, part, t, f in steps]

        def renoise(block: OpenBlock) -> Tensor:
            shape = tuple(block.latents.shape)
            return self._checked_noise(self.noise.renoise(block.index, block.start_frame, block.level, shape), shape)

        self._fill()
        done = None
        while done is None:
            start, index = self.next_open_frame, self._next_index + len(window.blocks)
            x = self._noise(index, start) if start < self.end_frame and not window.is_full else None
            if x is not None:
                self._switch_prompt(start)
                window.enter(OpenBlock(index, start, x, 0, self._prompt_index))
            if not window.blocks:
                return None
            self.branches.commit_pending()
            done = window.advance(denoise, renoise)
        return Block(done.index, done.start_frame, done.latents, done.prompt_index)

    def _sparse_attention(self, geometry: Geometry) -> SparseSelfAttention | None:
        if self.attention.is_dense:
            return None
        return SparseSelfAttention(self.attention, geometry, num_steps=self.sampler.num_steps(0), meter=self._meter)

    @property
    def attention_density(self) -> float:
        """Share of the (query, key) pairs of self-attention that was computed so far; dense calls count as 1."""
        return self._meter.density

    def _step_ended(self, step_index: int, timestep: float, x0: Tensor) -> Tensor:
        if self.on_step_end is None:
            return x0
        return self.on_step_end(step_index, timestep, x0, self.branches.prompts[0].embeds)

    def _noise(self, index: int, start: int) -> Tensor | None:
        """What a block starts from; None where the source ends, and the rollout with it."""
        shape = (self.batch_size, self.frames_per_block if start else self.first_block_frames, *self.frame_shape)
        x = self.noise.initial(index, start, shape)
        if x.shape[1] == 0:
            self.end_frame = start
            return None
        return self._checked_noise(x, shape)

    def add_switch(self, switch: PromptSwitch) -> int:
        """Extend the schedule.

        Returns:
            Index of the block at which the switch takes effect.

        Raises:
            ValueError: If the policy does not know the event.
        """
        check_switch(self.policy, self.sampler, switch.event)
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
    def num_given_frames(self) -> int:
        """Latent frames that were given."""
        return self._num_given

    @property
    def next_frame(self) -> int:
        """First latent frame of the next block."""
        return self._next_frame

    @property
    def next_open_frame(self) -> int:
        """First latent frame of the next block that is not begun: a new prompt shows from here on."""
        if self.window is None or not self.window.blocks:
            return self._next_frame
        last = self.window.blocks[-1]
        return last.start_frame + last.num_frames

    @property
    def last_opening_frame(self) -> int:
        """First latent frame of the last block that is begun in making the next one."""
        if self.window is None or self.window.blocks:
            return self.next_open_frame
        return self.start_of(self._next_index + self.sampler.num_window_blocks - 1)

    @property
    def next_index(self) -> int:
        """Index of the next block."""
        return self._next_index

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a continuation needs beside the constructor's arguments.

        Returns:
            Tensors, each with memory of its own, and plain numbers that fit into JSON. Valid between blocks.

        Raises:
            ValueError: If some of the given latents are taken in and others not.
        """
        if 0 < self._next_given_frame < self._num_given:
            raise ValueError(
                f"{self._next_given_frame} of {self._num_given} given latents are taken in: save before or after."
            )
        tensors, numbers = self.branches.state_dict()
        numbers["next_frame"], numbers["next_index"] = self._next_frame, self._next_index
        numbers["next_given_frame"], numbers["prompt_index"] = self._next_given_frame, self._prompt_index
        if self.window is not None:
            latents, numbers["window"] = self.window.state_dict()
            tensors |= {f"window.{place}": tensor for place, tensor in latents.items()}
        return unshared(tensors), numbers

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue where another rollout with the same arguments was saved.

        Raises:
            ValueError: If the state does not belong to such a rollout.
        """
        for key in ("next_frame", "next_index", "prompt_index", "next_given_frame"):
            if key not in numbers:
                raise ValueError(f"the saved state has no {key!r}: it was not written by a rollout.")
        self.branches.load_state_dict(tensors, numbers)
        self._next_frame, self._next_index = numbers["next_frame"], numbers["next_index"]
        self._next_given_frame = numbers["next_given_frame"]
        if self.window is not None:
            if "window" not in numbers:
                raise ValueError("the saved state has no 'window': it was written with another sampler.")
            latents = {k.removeprefix("window."): v for k, v in tensors.items() if k.startswith("window.")}
            self.window.load_state_dict(latents, numbers["window"], self.causal.device)
        self._prompt_index = numbers["prompt_index"]
        embeds = self._first_prompt if self._prompt_index < 0 else self.schedule[self._prompt_index].prompt_embeds
        self.branches.take_prompt(embeds)

    def _fill(self) -> None:
        while self._take_given() is not None:
            pass

    def _take_given(self) -> Block | None:
        """Take in one block of the given latents; it waits for its commit at timestep 0 as any other block does."""
        start = self._next_given_frame
        if start >= self._num_given:
            return None
        self.branches.commit_pending()
        num_frames = self.frames_per_block if start else self.first_block_frames
        shape = (self.batch_size, num_frames, *self.frame_shape)
        latents = self._checked(self._given.take(num_frames), shape, "the given latents")
        self.branches.pending = Pending(BlockTrace(self._block_id(start), start, latents), 0.0)
        self._next_given_frame += num_frames
        return Block(self._block_id(start) - self._block_id(self._num_given), start, latents)

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

    @property
    def _num_joint_frames(self) -> int:
        """Most frames that are denoised together."""
        rest = (self.sampler.num_window_blocks - 1) * self.frames_per_block
        return max(self.first_block_frames, self.frames_per_block) + rest

    def _block_id(self, start_frame: int) -> int:
        """Index of a block in the video, given latents counted."""
        first = self.first_block_frames
        return 0 if start_frame < first else 1 + (start_frame - first) // self.frames_per_block

    def _checked_noise(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return self._checked(x, shape, "the noise source")

    def _checked(self, x: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
        if tuple(x.shape) != shape:
            raise ValueError(f"{what} gave shape {tuple(x.shape)} where {shape} was asked for.")
        return x.to(self.causal.device, self.causal.latent_dtype)
