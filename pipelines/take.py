"""One video being made: blocks of latents, decoded as they come, resumable between blocks."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from longtake.cache import CacheStats, Event
from longtake.pipelines.checks import check_switch
from longtake.pipelines.positions import PositionUse
from longtake.pipelines.prompts import PromptSwitch
from longtake.pipelines.rollout import Block, LatentRollout

if TYPE_CHECKING:
    from longtake.pipelines.long_video import LongVideoPipeline


@dataclass(frozen=True)
class Chunk:
    """A finished block as pixels.

    Attributes:
        index: From 0; what the video goes on from comes before, and its last block is -1.
        start_frame: First latent frame, those that were given counted.
        frames: (batch, frames, channels, height, width) float32 in [0, 1].
        latents: (batch, latent frames, channels, height, width), normalised.
        stats: What the cache holds.
        num_cache_bytes: Storage and read sets of all guidance branches.
        seconds: Time spent in ``denoise`` and ``decode``; ``observe`` where a given block was taken in.
        is_last: Whether the video ends here.
        prompt: The prompts in force, one per sample.
    """

    index: int
    start_frame: int
    frames: Tensor
    latents: Tensor
    stats: CacheStats
    num_cache_bytes: int
    seconds: Mapping[str, float]
    is_last: bool
    prompt: tuple[str, ...]

    def uint8(self) -> np.ndarray:
        """Frames as (batch, frames, height, width, channels) bytes, rounded."""
        return to_bytes(self.frames).cpu().numpy()


class TakeSession:
    """A video under way: iterate for chunks, save and load between them.

    Made by ``LongVideoPipeline.start``.

    Args:
        pipe: Where the VAE and the text encoder are.
        rollout: The latents.
        prompts: One per sample.
        num_frames: Pixel frames to make; what the last block has beyond is dropped. Time 0 is where they begin.
        fps: Frames per second.
        decode: Whether chunks carry pixels; without, ``frames`` has none.
        include_start: Whether iterating gives what the video goes on from too, before the rest.
    """

    def __init__(
        self,
        pipe: "LongVideoPipeline",
        rollout: LatentRollout,
        prompts: Sequence[str],
        *,
        num_frames: int,
        fps: int,
        decode: bool = True,
        include_start: bool = True,
    ) -> None:
        self.pipe = pipe
        self.rollout = rollout
        self.num_frames = num_frames
        self.fps = fps
        self.decode = decode
        self.include_start = include_start
        self.num_emitted_frames = 0
        self.positions = PositionUse(rollout.policy.name, pipe.family.num_trained_frames)
        self._prompts = [tuple(prompts)]
        stream, self._pixels = pipe.pixel_stream()
        self._decoder = stream if decode else None

    @property
    def attention_density(self) -> float:
        """Share of self-attention that was computed so far; 1 where it is dense."""
        return self.rollout.attention_density

    @property
    def num_start_frames(self) -> int:
        """Pixel frames that the video goes on from; 0 where it begins with the prompt."""
        return self._place(self.rollout.num_given_frames)

    @property
    def num_blocks(self) -> int:
        """Blocks to make."""
        r = self.rollout
        return r.next_index + max(0, -(-(r.end_frame - r.next_frame) // r.frames_per_block))

    @property
    def next_block_index(self) -> int:
        """Index of the chunk that comes next."""
        return self.rollout.next_index

    def __iter__(self) -> Iterator[Chunk]:
        """Yield the chunks that are still to be made."""
        while (chunk := self.next_chunk()) is not None:
            yield chunk

    def next_chunk(self) -> Chunk | None:
        """Make the next chunk, or None at the end."""
        for chunk in self.observe():
            if self.include_start:
                return chunk
        start = time.perf_counter()
        block = self.rollout.next_block()
        if block is None:
            return None
        chunk = self._chunk(block, "denoise", start, num_frames=self.num_frames - self.num_emitted_frames)
        self.num_emitted_frames += chunk.frames.shape[1]
        return chunk

    def observe(self) -> Iterator[Chunk]:
        """Take in what the video goes on from, block by block, and yield it; nothing once all of it is in.

        It is decoded whether it is shown or not: the decoder goes on from it as the rollout does.
        """
        start = time.perf_counter()
        while (block := self.rollout.next_given()) is not None:
            yield self._chunk(block, "observe", start)
            start = time.perf_counter()

    def _chunk(self, block: Block, work: str, start: float, *, num_frames: int | None = None) -> Chunk:
        made = time.perf_counter()
        frames = self._decode(block.latents, num_frames)
        decoded = time.perf_counter()
        stats = self.rollout.stats()
        self.positions.see(stats.positions)
        return Chunk(
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

    def change_prompt(self, prompt: str | Sequence[str], *, event: Event = "keep", at: float | None = None) -> int:
        """Switch to another prompt from the next block on, or later.

        Args:
            prompt: One text for all samples, or one per sample.
            event: What happens to the cache; see the policy.
            at: Seconds: the first block that starts at or after this time; None is the next one.

        Returns:
            Index of the block at which it takes effect.

        Raises:
            ValueError: If the text is empty or too long, the policy does not know the event, or ``at`` is before the
                next block or another change.
        """
        r = self.rollout
        check_switch(r.policy, r.sampler, event)
        start = r.next_open_frame if at is None else self._latent_frame(at)
        # Between the starts of two blocks any time means the second.
        earliest = max([r.next_open_frame - r.frames_per_block + 1, *(switch.start_frame for switch in r.schedule)])
        if start < earliest:
            seconds = self._pixel_frame(earliest) / self.fps
            raise ValueError(f"a prompt change at {at} s is too late or out of order: {seconds:g} s is the earliest.")
        prompts = [prompt] * r.batch_size if isinstance(prompt, str) else list(prompt)
        index = r.add_switch(PromptSwitch(start, self.pipe.embed_text(prompts), event))
        self._prompts.append(tuple(prompts))
        return index

    def is_due(self, at: float) -> bool:
        """Whether the next chunk's making begins the first block that starts at or after a time, in seconds."""
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
        r = self.rollout
        switches = zip(r.schedule, self._prompts[1:], strict=True)
        return [
            {
                "block": r.switch_index(switch),
                "start_frame": r.start_of(r.switch_index(switch)),
                "prompt": prompts[0] if len(set(prompts)) == 1 else list(prompts),
                "event": switch.event,
            }
            for switch, prompts in switches
        ]

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a continuation needs beside the arguments of ``LongVideoPipeline.start``.

        Returns:
            Tensors, and plain values that fit into JSON. Valid between chunks.
        """
        tensors, numbers = self.rollout.state_dict()
        tensors = {f"rollout.{key}": value for key, value in tensors.items()}
        state: dict[str, Any] = {
            "rollout": numbers,
            "num_emitted_frames": self.num_emitted_frames,
            "positions": self.positions.as_mapping(),
        }
        switches = zip(self.rollout.schedule, self._prompts[1:], strict=True)
        state["prompts"] = [{"frame": s.start_frame, "prompt": list(p), "event": s.event} for s, p in switches]
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
                raise ValueError(f"the saved state has no {key!r}: it was not written by a take.")
        self.rollout.schedule.clear()
        del self._prompts[1:]
        for switch in numbers["prompts"]:
            embeds = self.pipe.embed_text(switch["prompt"])
            self.rollout.schedule.append(PromptSwitch(switch["frame"], embeds, switch["event"]))
            self._prompts.append(tuple(switch["prompt"]))
        self.rollout.load_state_dict(_under("rollout.", tensors), numbers["rollout"])
        if self._decoder is not None:
            if "decoder" not in numbers:
                raise ValueError("the saved state has no 'decoder': it was written without pixels.")
            self._decoder.load_state_dict(_under("decoder.", tensors), numbers["decoder"])
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

    def _pixel_frame(self, latent_frame: int) -> int:
        """Its first pixel frame, from time 0."""
        return self._place(latent_frame) - self._place(self.rollout.num_given_frames)

    def _place(self, latent_frame: int) -> int:
        """Its first pixel frame, those that were given counted."""
        return 0 if latent_frame == 0 else 1 + (latent_frame - 1) * self.pipe.vae_scale_factor_temporal

    @torch.no_grad()
    def _decode(self, latents: Tensor, num_frames: int | None) -> Tensor:
        """(batch, frames, channels, height, width) latents to float32 pixels in [0, 1], the first so many of them."""
        if self._decoder is None:
            return latents.new_empty(latents.shape[0], 0, 3, 0, 0)
        video = self._decoder.decode(self._pixels.denormalise(latents))
        return to_pixels(video[:, :, :num_frames])


def to_bytes(frames: Tensor) -> Tensor:
    """(batch, frames, channels, height, width) in [0, 1] to bytes, rounded, channels last."""
    return frames.mul(255.0).round_().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()


def to_pixels(video: Tensor) -> Tensor:
    """(batch, channels, frames, height, width) in [-1, 1], as the VAE has it, to frames of float32 in [0, 1]."""
    return video.float().mul(0.5).add(0.5).clamp_(0.0, 1.0).transpose(1, 2)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
