"""The rollout: blocks of latents, one after the other, each seeing what the cache policy kept of those before it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from longtake.attention.policies.base import DensityMeter
from longtake.cache import BlockTrace, CacheStats, EncodeJob, Event, KVCache, Pass
from longtake.models import VaePixels
from longtake.models.causal import CausalTransformer, Prompt, Segment, fitting_threads
from longtake.models.sparse_attention import SparseSelfAttention
from longtake.models.wan import config_of
from longtake.pipelines.conditioning import ConditioningLatents
from longtake.pipelines.settings import EVENTS, PromptSwitch, RolloutSettings, takes_fields_of
from longtake.samplers import NoiseSource, RollingWindow, rolling_window

StepHook = Callable[[int, float, Tensor, Tensor], Tensor]
"""(step_index, timestep, x0, prompt_embeds) -> x0, after every denoising step."""

# Above this many tokens per forward the matmuls are large enough alone, and per-token modulation costs more memory
# than one forward less is worth.
MERGE_LIMIT = 4096


@dataclass(frozen=True)
class Block:
    """A finished block."""

    index: int  # from 0; blocks of conditioning latents come before, -1 the last of them
    start_frame: int  # first latent frame in the video, conditioning latents counted
    latents: Tensor  # (batch, frames, channels, height, width), clean, normalised
    prompt_index: int = -1  # entry of the schedule that it was made with; -1 is the first prompt


@dataclass(frozen=True)
class _OpenBlock(Block):
    level: int = 0  # denoising steps it has been through


class LatentRollout:
    """A rollout that can be stopped between blocks, saved, and continued.

    A block's commit pass shares one forward with the next block's first denoising pass where that pays
    (``merge_commit``); the last block is never committed. ``on_step_end`` may be set to watch or change every estimate
    of a clean block. The arguments are those of ``rollout_latents``, but prompt switches are added by ``add_switch``,
    also while the rollout runs, and ``settings`` may come in one piece.
    """

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        prompt_embeds: Tensor,
        *,
        noise: NoiseSource,
        initial_latents: Tensor | ConditioningLatents | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pixels: VaePixels | None = None,
        settings: RolloutSettings | None = None,
        **fields: Any,
    ) -> None:
        self.settings = s = settings or RolloutSettings(**fields)
        self.policy, self.sampler, self.frames_per_block = s.policy, s.solver, s.frames_per_block
        self.causal = CausalTransformer(transformer, numerics=s.numerics)
        self.noise = noise
        self.schedule: list[PromptSwitch] = []
        self.batch_size = prompt_embeds.shape[0]
        self._frame_shape = tuple(s.frame_shape)
        if isinstance(initial_latents, Tensor):
            length = initial_latents.shape[1] if initial_latents.ndim > 1 else 0
            wanted = (self.batch_size, length, *self._frame_shape)
            if tuple(initial_latents.shape) != wanted:
                raise ValueError(f"initial_latents has shape {tuple(initial_latents.shape)}, expected {wanted}.")
            initial_latents = ConditioningLatents(initial_latents)
        self._conditioning = initial_latents
        self.num_given_frames = 0 if self._conditioning is None else self._conditioning.num_frames
        s.check_length(num_given=self.num_given_frames)
        if self.policy.traits.needs_vae and pixels is None:
            raise ValueError(
                f"cache policy {self.policy.name!r} pools pixels with these settings and needs a VAE: "
                "give pixels, or use LongVideoPipeline."
            )
        self.end_frame = self.num_given_frames + s.num_frames
        self._geometry = geometry = self.causal.geometry(
            self._frame_shape,
            frames_per_block=self.frames_per_block,
            batch_size=self.batch_size,
            max_frames=self.end_frame,
        )
        tokens = geometry.tokens_per_frame * self.frames_per_block
        self.merge_commit = 2 * tokens <= MERGE_LIMIT if s.merge_commit is None else s.merge_commit
        embeds = [prompt_embeds]
        if self.sampler.guidance_scale != 1.0:
            negative = negative_prompt_embeds
            embeds.append(torch.zeros_like(prompt_embeds) if negative is None else negative)
        self._meter = DensityMeter(s.sparsity.policy)
        kernels = {"attention": self.causal.attention, "phase_dtype": self.causal.phase_dtype}
        caches = [KVCache(self.policy, geometry, sparse=self._sparse_attention(), **kernels) for _ in embeds]
        self.branches = _Branches(self.causal, caches, embeds, settings=s, pixels=pixels)
        # Of the levels in a window of several blocks; empty where a block is denoised by itself.
        self._window_sigmas = s.solver.sigmas if isinstance(s.solver, RollingWindow) else ()
        if len(self._window_sigmas) == 1:
            self._window_sigmas = ()
        self._window: list[_OpenBlock] = []  # cleanest first
        self._first_prompt = prompt_embeds
        self._next_given_frame = 0
        self.next_frame, self.next_index = self.num_given_frames, 0
        self._prompt_index = -1
        self.on_step_end: StepHook | None = None

    def __iter__(self) -> Iterator[Block]:
        while (block := self.next_block()) is not None:
            yield block

    @torch.no_grad()
    def next_block(self) -> Block | None:
        if self.next_frame >= self.end_frame:
            return None
        with self._installed():
            block = self._window_block() if self._window_sigmas else self._single_block()
        if block is None:
            return None
        trace = BlockTrace(self._block_id(block.start_frame), block.start_frame, block.latents)
        self.branches.pending = _Pending(trace, self.branches.context_timestep)
        self.next_frame, self.next_index = block.start_frame + block.latents.shape[1], block.index + 1
        return block

    @torch.no_grad()
    def next_given(self) -> Block | None:
        """Take in the next block of the conditioning latents, or None at their end."""
        with self._installed():
            return self._take_given()

    @contextmanager
    def _installed(self) -> Iterator[None]:
        geometry = self._geometry
        num_tokens = self.batch_size * self.settings.num_joint_frames * geometry.tokens_per_frame
        threads = fitting_threads(
            width=geometry.num_heads * geometry.head_dim, num_tokens=num_tokens, device=self.causal.device
        )
        with self.causal.installed(), threads:
            yield

    def _single_block(self) -> Block | None:
        start, index = self.next_frame, self.next_index
        x = self._noise(index, start)
        if x is None:
            return None
        num_frames, block_id = x.shape[1], self._block_id(start)
        self._fill()
        self._switch_prompt(start)
        if not (self.merge_commit and self.branches.can_merge(num_frames)):
            self.branches.commit_pending()
        step_index = 0

        def denoise(x: Tensor, timestep: float) -> Tensor:
            nonlocal step_index
            pass_ = Pass("denoise", block_id, start, num_frames, step_index)
            flow = self.branches.guided_flow(x, Segment(pass_, float(timestep)))
            x0 = self._step_ended(step_index, timestep, self.causal.clean(x, flow, timestep))
            step_index += 1
            return x0

        def renoise(step: int) -> Tensor:
            return self._renoise(index, start, step, tuple(x.shape))

        latents = self.sampler.sample(denoise, x, renoise=renoise, block_index=index)
        return Block(index, start, latents, self._prompt_index)

    def _window_block(self) -> Block | None:
        """Denoise the window until its first block is clean, letting a block in before every forward."""
        self._fill()
        while True:
            start, index = self.next_open_frame, self.next_index + len(self._window)
            has_room = len(self._window) < len(self._window_sigmas) and start < self.end_frame
            x = self._noise(index, start) if has_room else None
            if x is not None:
                self._switch_prompt(start)
                self._window.append(_OpenBlock(index, start, x, self._prompt_index))
            if not self._window:
                return None
            self.branches.commit_pending()
            self._advance_window()
            if self._window[0].level == len(self._window_sigmas):
                done = self._window.pop(0)
                return Block(done.index, done.start_frame, done.latents, done.prompt_index)

    def _advance_window(self) -> None:
        """Move every block of the window to its next level by one forward."""
        blocks = self._window

        def denoise(parts: list[Tensor], timesteps: list[float]) -> list[Tensor]:
            lengths = [part.shape[1] for part in parts]
            # Of blocks, or of frames where blocks differ in length.
            repeats = [1] * len(parts) if len(set(lengths)) == 1 else lengths
            levels = tuple(t for t, repeat in zip(timesteps, repeats, strict=True) for _ in range(repeat))
            first = blocks[0].start_frame
            pass_ = Pass("denoise", self._block_id(first), first, sum(lengths))
            flow = self.branches.guided_flow(torch.cat(parts, dim=1), Segment(pass_, levels))
            steps = zip(blocks, parts, timesteps, flow.split(lengths, dim=1), strict=True)
            return [self._step_ended(b.level, t, self.causal.clean(part, f, t)) for b, part, t, f in steps]

        def renoise(place: int) -> Tensor:
            block = blocks[place]
            return self._renoise(block.index, block.start_frame, block.level, tuple(block.latents.shape))

        latents = rolling_window(
            denoise,
            [block.latents for block in blocks],
            levels=[block.level for block in blocks],
            sigmas=self._window_sigmas,
            renoise=renoise,
        )
        self._window = [replace(b, latents=x, level=b.level + 1) for b, x in zip(blocks, latents, strict=True)]

    def _sparse_attention(self) -> SparseSelfAttention | None:
        setting = self.settings.sparsity
        if setting.is_dense:
            return None
        return SparseSelfAttention(setting, self._geometry, num_steps=self.sampler.num_steps(0), meter=self._meter)

    @property
    def attention_density(self) -> float:
        """Share of the (query, key) pairs of self-attention that was computed so far; dense calls count as 1."""
        return self._meter.density

    def _step_ended(self, step_index: int, timestep: float, x0: Tensor) -> Tensor:
        if self.on_step_end is None:
            return x0
        return self.on_step_end(step_index, timestep, x0, self.branches.prompts[0].embeds)

    def _noise(self, index: int, start: int) -> Tensor | None:
        num_frames = self.frames_per_block if start else self.settings.num_first_frames
        shape = (self.batch_size, num_frames, *self._frame_shape)
        x = self.noise.initial(index, start, shape)
        if x.shape[1] == 0:
            self.end_frame = start
            return None
        return self._checked(x, shape, "the noise source")

    def _renoise(self, index: int, start: int, step: int, shape: tuple[int, ...]) -> Tensor:
        return self._checked(self.noise.renoise(index, start, step, shape), shape, "the noise source")

    def add_switch(self, switch: PromptSwitch) -> int:
        """Extend the schedule; return the index of the block at which the switch takes effect."""
        self.settings.check_event(switch.event)
        self.schedule.append(switch)
        return self.switch_index(switch)

    def switch_index(self, switch: PromptSwitch) -> int:
        """Index of the block at which a switch takes effect, conditioning latents not counted."""
        given = self.num_given_frames
        index = self._block_id(max(switch.start_frame, given)) - self._block_id(given)
        return index + (self.start_of(index) < switch.start_frame)

    def start_of(self, index: int) -> int:
        """First latent frame of a block, conditioning latents not counted in ``index``."""
        block = index + self._block_id(self.num_given_frames)
        return self.settings.num_first_frames + (block - 1) * self.frames_per_block if block else 0

    def stats(self) -> CacheStats:
        return self.branches.caches[0].stats()

    @property
    def num_cache_bytes(self) -> int:
        """Bytes of all branches' storage and read sets."""
        return sum(cache.stats().num_bytes + cache.num_scratch_bytes for cache in self.branches.caches)

    @property
    def next_open_frame(self) -> int:
        """First latent frame of the next block that is not begun: a new prompt shows from here on."""
        if not self._window:
            return self.next_frame
        return self._window[-1].start_frame + self._window[-1].latents.shape[1]

    @property
    def last_opening_frame(self) -> int:
        """First latent frame of the last block that is begun in making the next one."""
        if self._window or not self._window_sigmas:
            return self.next_open_frame
        return self.start_of(self.next_index + len(self._window_sigmas) - 1)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a continuation needs beside the constructor's arguments.

        Returns:
            Tensors, each with memory of its own, and plain numbers that fit into JSON. Valid between blocks.

        Raises:
            ValueError: If some of the conditioning latents are taken in and others not.
        """
        if 0 < self._next_given_frame < self.num_given_frames:
            raise ValueError(
                f"{self._next_given_frame} of {self.num_given_frames} given latents are taken in: "
                "save before or after."
            )
        tensors, numbers = self.branches.state_dict()
        numbers["next_frame"], numbers["next_index"] = self.next_frame, self.next_index
        numbers["next_given_frame"], numbers["prompt_index"] = self._next_given_frame, self._prompt_index
        if self._window_sigmas:
            names = ("index", "start_frame", "level", "prompt_index")
            numbers["window"] = [{name: getattr(block, name) for name in names} for block in self._window]
            tensors |= {f"window.{place}": block.latents for place, block in enumerate(self._window)}
        return _unshared(tensors), numbers

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue where another rollout with the same arguments was saved."""
        for key in ("next_frame", "next_index", "prompt_index", "next_given_frame"):
            if key not in numbers:
                raise ValueError(f"the saved state has no {key!r}: it was not written by a rollout.")
        self.branches.load_state_dict(tensors, numbers)
        self.next_frame, self.next_index = numbers["next_frame"], numbers["next_index"]
        self._next_given_frame, self._prompt_index = numbers["next_given_frame"], numbers["prompt_index"]
        if self._window_sigmas:
            if "window" not in numbers:
                raise ValueError("the saved state has no 'window': it was written with another sampler.")
            latents = [tensors[f"window.{place}"].to(self.causal.device) for place in range(len(numbers["window"]))]
            blocks = zip(latents, numbers["window"], strict=True)
            self._window = [_OpenBlock(latents=x, **values) for x, values in blocks]
        embeds = self._first_prompt if self._prompt_index < 0 else self.schedule[self._prompt_index].prompt_embeds
        self.branches.set_prompt(embeds)

    def _fill(self) -> None:
        while self._take_given() is not None:
            pass

    def _take_given(self) -> Block | None:
        """Take in one block of the conditioning latents; like any block it waits for its commit, at timestep 0."""
        start = self._next_given_frame
        if self._conditioning is None or start >= self.num_given_frames:
            return None
        self.branches.commit_pending()
        num_frames = self.frames_per_block if start else self.settings.num_first_frames
        shape = (self.batch_size, num_frames, *self._frame_shape)
        latents = self._checked(self._conditioning.take(num_frames), shape, "the given latents")
        self.branches.pending = _Pending(BlockTrace(self._block_id(start), start, latents), 0.0)
        self._next_given_frame += num_frames
        return Block(self._block_id(start) - self._block_id(self.num_given_frames), start, latents)

    def _switch_prompt(self, start_frame: int) -> None:
        """Take the prompt in force at a frame; the block before belongs to the old one and is committed with it."""
        due = self._prompt_index + 1
        while due < len(self.schedule) and self.schedule[due].start_frame <= start_frame:
            due += 1
        switches = self.schedule[self._prompt_index + 1 : due]
        if switches:
            # Of several switches before one block the last prompt counts, and the event that does most to the cache.
            event = EVENTS[max(EVENTS.index(switch.event) for switch in switches)]
            self.branches.commit_pending(event=event, embeds=switches[-1].prompt_embeds)
            self._prompt_index = due - 1

    def _block_id(self, start_frame: int) -> int:
        """Index of a block in the video, conditioning latents counted."""
        first = self.settings.num_first_frames
        return 0 if start_frame < first else 1 + (start_frame - first) // self.frames_per_block

    def _checked(self, x: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
        if tuple(x.shape) != shape:
            raise ValueError(f"{what} gave shape {tuple(x.shape)} where {shape} was asked for.")
        return x.to(self.causal.device, self.causal.latent_dtype)


@takes_fields_of(RolloutSettings)
def rollout_latents(
    transformer: WanTransformer3DModel,
    prompt_embeds: Tensor,
    *,
    noise: NoiseSource,
    initial_latents: Tensor | ConditioningLatents | None = None,
    schedule: Sequence[tuple[int, Tensor, Event]] = (),
    negative_prompt_embeds: Tensor | None = None,
    pixels: VaePixels | None = None,
    **settings: Any,
) -> Iterator[Block]:
    """Roll a transformer out over latent frames, without text and pixels.

    Args:
        transformer: Any ``WanTransformer3DModel``; stock again whenever a block is yielded.
        prompt_embeds: (batch, text_len, text_dim), fed to the transformer's text embedder as they are.
        noise: A source that ends (zero frames) ends the rollout.
        initial_latents: (batch, frames, channels, height, width): they fill the cache at timestep 0, block by block;
            or a stream that makes them as they are taken, so that their number has no limit.
        schedule: (start_frame, prompt_embeds, event) prompt switches; event: keep, recache, flush, cut.
        negative_prompt_embeds: For samplers with guidance; zeros when not given.
        pixels: Pools latents by way of pixels, for policies that ask for it; ``models.VaePixels`` does.
        **settings: Fields of ``RolloutSettings``.

    Yields:
        Blocks in order.

    Raises:
        ValueError: For settings that do not fit each other, before any forward.
    """
    given = {"initial_latents": initial_latents, "negative_prompt_embeds": negative_prompt_embeds, "pixels": pixels}
    rollout = LatentRollout(transformer, prompt_embeds, noise=noise, **given, **settings)
    for entry in schedule:
        rollout.add_switch(PromptSwitch(*entry))
    return iter(rollout)


@dataclass(frozen=True)
class _Pending:
    """A finished block that is not committed yet, and the timestep it is committed at."""

    trace: BlockTrace
    timestep: float

    @property
    def segment(self) -> Segment:
        pass_ = Pass("commit", self.trace.block_index, self.trace.start_frame, self.trace.latents.shape[1])
        return Segment(pass_, self.timestep)


class _Branches:
    """The conditional branch of a rollout and, with guidance, the unconditional one: caches, prompts, encode jobs.

    The transformer has to be installed whenever something is run.
    """

    def __init__(
        self,
        causal: CausalTransformer,
        caches: Sequence[KVCache],
        embeds: Sequence[Tensor],
        *,
        settings: RolloutSettings,
        pixels: VaePixels | None,
    ) -> None:
        self.causal = causal
        self.caches = caches
        self.prompts = [self._prompt(e) for e in embeds]
        self.guidance_scale = settings.solver.guidance_scale
        self.context_timestep = float(settings.context_timestep)
        self.pixels = pixels
        self.pending: _Pending | None = None

    def can_merge(self, num_frames: int) -> bool:
        """Tell if the waiting commit may share a forward of ``num_frames``: equal lengths, nothing in between."""
        is_equal = self.pending is not None and self.pending.trace.latents.shape[1] == num_frames
        return is_equal and self.caches[0].merges_commit

    def set_prompt(self, embeds: Tensor) -> None:
        self.prompts[0] = self._prompt(embeds)

    def guided_flow(self, x: Tensor, segment: Segment) -> Tensor:
        """Predict the guided flow; a block that waits for its commit is committed in the same forward."""
        flows = [self._flow(branch, x, segment) for branch in range(len(self.prompts))]
        if self.pending is not None:
            self._run(*self._end_block(self.pending.trace, "keep"))
        if len(flows) == 1:
            return flows[0]
        cond, uncond = flows
        return uncond + self.guidance_scale * (cond - uncond)

    def commit_pending(self, *, event: Event = "keep", embeds: Tensor | None = None) -> None:
        """Commit the waiting block by itself under the prompt it was made with; then jobs, under the next one.

        ``embeds`` is the next prompt if it is a new one, ``event`` its effect on the cache.
        """
        done = None
        if self.pending is not None:
            for branch in range(len(self.prompts)):
                self._forward(branch, self.pending.trace.latents, [self.pending.segment])
            done = self._end_block(self.pending.trace, event)
        if embeds is not None:
            self.set_prompt(embeds)
        if done is not None:
            self._run(*done)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        values: dict[str, Any] = {}
        if self.pending is not None:
            trace, values["pending.timestep"] = self.pending.trace, self.pending.timestep
            names = ("latents", "block_index", "start_frame")
            values |= {f"pending.{name}": getattr(trace, name) for name in names}
        for branch, cache in enumerate(self.caches):
            values |= {f"cache.{branch}.{key}": value for key, value in cache.state_dict().items()}
        tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        return tensors, {key: value for key, value in values.items() if key not in tensors}

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        for branch, cache in enumerate(self.caches):
            cache.load_state_dict(under(f"cache.{branch}.", {**tensors, **numbers}))
        self.pending = None
        if "pending.latents" in tensors:
            latents = tensors["pending.latents"].to(self.causal.device)
            trace = BlockTrace(numbers["pending.block_index"], numbers["pending.start_frame"], latents)
            self.pending = _Pending(trace, numbers["pending.timestep"])

    def _prompt(self, embeds: Tensor) -> Prompt:
        return Prompt(embeds.to(self.causal.device, self.causal.dtype))

    def _flow(self, branch: int, x: Tensor, segment: Segment) -> Tensor:
        if self.pending is None:
            return self._forward(branch, x, [segment])
        joined = torch.cat((self.pending.trace.latents, x), dim=1)
        return self._forward(branch, joined, [self.pending.segment, segment])[:, -x.shape[1] :]

    def _forward(self, branch: int, x: Tensor, segments: Sequence[Segment], tokens: Tensor | None = None) -> Tensor:
        cache, prompt = self.caches[branch], self.prompts[branch]
        return self.causal.flow(x, segments=segments, cache=cache, prompt=prompt, tokens=tokens)

    def _end_block(self, done: BlockTrace, event: Event) -> tuple[BlockTrace, list[list[EncodeJob]]]:
        """Let the policy work on the block that has just been committed in all layers; its jobs by branch."""
        trace, self.pending = replace(done, event=event), None
        return trace, [cache.end_block(trace) for cache in self.caches]

    def _run(self, trace: BlockTrace, jobs: Sequence[Sequence[EncodeJob]]) -> None:
        pooled: dict[tuple, Tensor] = {}  # by what was pooled: the branches' jobs are mostly the same latents
        for branch, jobs_of_branch in enumerate(jobs):
            geometry = self.caches[branch].geometry
            for job in jobs_of_branch:
                latents = job.latents.to(self.causal.device)
                if job.pooling is not None:
                    key = (latents.data_ptr(), tuple(latents.shape), latents.stride(), job.pooling)
                    if key not in pooled:
                        pooled[key] = self._pooled(latents, job.pooling)
                    latents = pooled[key]
                grid = self._grid(latents)
                pass_ = Pass(
                    "encode",
                    trace.block_index,
                    job.start_frame,
                    latents.shape[1],
                    label=job.label,
                    grid=None if grid == (geometry.num_rows, geometry.num_columns) else grid,
                )
                timestep = self.context_timestep if job.timestep is None else float(job.timestep)
                self._forward(branch, latents, [Segment(pass_, timestep)], job.tokens)

    def _pooled(self, latents: Tensor, size: tuple[int, int, int]) -> Tensor:
        """A smaller clip, its right and lower rest that fills no patch left out."""
        if self.pixels is None:
            raise ValueError("a job wants its pixels pooled and this rollout has no VAE: give pixels.")
        small = self.pixels.pool(latents, size).to(self.causal.device, latents.dtype)
        rows, columns = self._grid(small)
        if not rows or not columns:
            raise ValueError(
                f"latents of {latents.shape[-2]}x{latents.shape[-1]} pooled by {size[1]}x{size[2]} are "
                f"{small.shape[-2]}x{small.shape[-1]}, less than one patch: use a larger video or less pooling."
            )
        _, height, width = config_of(self.causal.transformer).patch_size
        return small[..., : rows * height, : columns * width]

    def _grid(self, latents: Tensor) -> tuple[int, int]:
        _, height, width = config_of(self.causal.transformer).patch_size
        return latents.shape[-2] // height, latents.shape[-1] // width


def under(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Entries whose keys begin with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of what shares memory or has gaps, which files of tensors do not take: branches keep the same latents."""
    seen: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        result[key] = tensor.clone() if place in seen else tensor.contiguous()
        seen.add(result[key].untyped_storage().data_ptr())
    return result
