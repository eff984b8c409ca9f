"""The guidance branches of a rollout: their caches and prompts, the block that waits for its commit, encode jobs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from longtake.cache import BlockTrace, CachePolicy, EncodeJob, Event, Geometry, KVCache, Pass, SparseAttention
from longtake.models.causal import CausalTransformer, Prompt, Segment


class Pixels(Protocol):
    """What a rollout needs of a VAE."""

    def pool(self, latents: Tensor, size: tuple[int, int, int]) -> Tensor:
        """Decode (batch, frames, channels, height, width) latents as a clip of their own, average, encode again.

        Args:
            latents: Normalised.
            size: Pixel frames, rows and columns that become one.

        Returns:
            Normalised latents of the smaller clip.
        """


@dataclass(frozen=True)
class Pending:
    """A finished block that is not committed yet, and the timestep it is committed at."""

    trace: BlockTrace
    timestep: float

    @property
    def segment(self) -> Segment:
        """Its commit pass."""
        pass_ = Pass("commit", self.trace.block_index, self.trace.start_frame, self.trace.latents.shape[1])
        return Segment(pass_, self.timestep)


class Branches:
    """The conditional branch of a rollout and, with guidance, the unconditional one.

    Args:
        causal: The transformer; has to be installed whenever something is run.
        policy: Of every branch's cache.
        geometry: Shapes of the rollout.
        embeds: (batch, text_len, text_dim) by branch, the conditional one first.
        guidance_scale: Weight of the conditional branch; of no use to a single one.
        pixels: For jobs with ``pooling``.
        context_timestep: For jobs that leave theirs to the rollout.
        sparse: Makes the sparse attention of a branch's cache; None: dense.
    """

    def __init__(
        self,
        causal: CausalTransformer,
        policy: CachePolicy,
        geometry: Geometry,
        *,
        embeds: Sequence[Tensor],
        guidance_scale: float,
        pixels: Pixels | None,
        context_timestep: float = 0.0,
        sparse: Callable[[], SparseAttention | None] = lambda: None,
    ) -> None:
        self.causal = causal
        self.context_timestep = context_timestep
        self.guidance_scale = guidance_scale
        self.pixels = pixels
        self.prompts = [self._prompt(e) for e in embeds]
        kernels = {"attention": causal.attention, "phase_dtype": causal.phase_dtype}
        self.caches = [KVCache(policy, geometry, sparse=sparse(), **kernels) for _ in embeds]
        self.pending: Pending | None = None

    def can_merge(self, num_frames: int) -> bool:
        """Whether the waiting commit may share a forward of ``num_frames``: equal lengths, nothing in between."""
        is_equal = self.pending is not None and self.pending.trace.latents.shape[1] == num_frames
        return is_equal and self.caches[0].merges_commit

    def take_prompt(self, embeds: Tensor) -> None:
        """Show something else from now on."""
        self.prompts[0] = self._prompt(embeds)

    def guided_flow(self, x: Tensor, segment: Segment) -> Tensor:
        """Predict the guided flow; a block that waits for its commit is committed in the same forward."""
        flows = [self._flow(branch, x, segment) for branch in range(len(self.prompts))]
        if self.pending is not None:
            self._run(*self._end_block("keep"))
        if len(flows) == 1:
            return flows[0]
        cond, uncond = flows
        return uncond + self.guidance_scale * (cond - uncond)

    def commit_pending(self, *, event: Event = "keep", embeds: Tensor | None = None) -> None:
        """Commit the waiting block by itself under the prompt it was made with; then jobs, under the next one.

        Args:
            event: What the next prompt does to the cache.
            embeds: The next prompt, if it is a new one.
        """
        done = None
        if self.pending is not None:
            for branch in range(len(self.prompts)):
                self._forward(branch, self.pending.trace.latents, [self.pending.segment])
            done = self._end_block(event)
        if embeds is not None:
            self.take_prompt(embeds)
        if done is not None:
            self._run(*done)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the caches hold and the block that waits: tensors, and plain numbers."""
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        if self.pending is not None:
            tensors["pending.latents"] = self.pending.trace.latents
            numbers["pending.block_index"] = self.pending.trace.block_index
            numbers["pending.start_frame"] = self.pending.trace.start_frame
            numbers["pending.timestep"] = self.pending.timestep
        for branch, cache in enumerate(self.caches):
            for key, value in cache.state_dict().items():
                (tensors if isinstance(value, Tensor) else numbers)[f"cache.{branch}.{key}"] = value
        return tensors, numbers

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take over a saved state."""
        merged = {**tensors, **numbers}
        for branch, cache in enumerate(self.caches):
            prefix = f"cache.{branch}."
            cache.load_state_dict({k.removeprefix(prefix): v for k, v in merged.items() if k.startswith(prefix)})
        self.pending = None
        if "pending.latents" in tensors:
            trace = BlockTrace(
                numbers["pending.block_index"],
                numbers["pending.start_frame"],
                tensors["pending.latents"].to(self.causal.device),
            )
            self.pending = Pending(trace, numbers["pending.timestep"])

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

    def _end_block(self, event: Event) -> tuple[BlockTrace, list[list[EncodeJob]]]:
        """Let the policy work on the block that has just been committed in all layers; its jobs by branch."""
        waiting = self.pending.trace
        trace = BlockTrace(waiting.block_index, waiting.start_frame, waiting.latents, event)
        self.pending = None
        return trace, [cache.end_block(trace) for cache in self.caches]

    def _run(self, trace: BlockTrace, jobs: Sequence[Sequence[EncodeJob]]) -> None:
        pooled: dict[tuple, Tensor] = {}  # by what was pooled: the branches' jobs are mostly the same latents
        for branch, jobs_of_branch in enumerate(jobs):
            for job in jobs_of_branch:
                latents, grid = job.latents.to(self.causal.device), None
                if job.pooling is not None:
                    key = (latents.data_ptr(), tuple(latents.shape), latents.stride(), job.pooling)
                    if key not in pooled:
                        pooled[key] = self._pooled(latents, job.pooling)
                    latents = pooled[key]
                rows, columns = self._grid(latents)
                geometry = self.caches[branch].geometry
                if (rows, columns) != (geometry.num_rows, geometry.num_columns):
                    grid = (rows, columns)
                pass_ = Pass(
                    "encode", trace.block_index, job.start_frame, latents.shape[1], label=job.label, grid=grid
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
        _, height, width = self.causal.transformer.config.patch_size
        return small[..., : rows * height, : columns * width]

    def _grid(self, latents: Tensor) -> tuple[int, int]:
        _, height, width = self.causal.transformer.config.patch_size
        return latents.shape[-2] // height, latents.shape[-1] // width


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of what shares memory or has gaps, which files of tensors do not take: branches keep the same latents."""
    seen: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        result[key] = tensor.clone() if place in seen else tensor.contiguous()
        seen.add(result[key].untyped_storage().data_ptr())
    return result
