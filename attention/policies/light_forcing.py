"""Light Forcing: sparser with every block of a rollout, and of the past only what each query block asks for."""

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from longtake.attention.geometry import AttentionGeometry
from longtake.attention.plan import BlockPlan, split_runs
from longtake.attention.policies.base import (
    Memory,
    Recent,
    TokenPolicy,
    Tokens,
    block_means,
    shared_heads,
    sum_by_group,
)


@dataclass(frozen=True, kw_only=True)
class LightForcing(TokenPolicy):
    """Chunk-aware growth and hierarchical selection (frames, then blocks), for block-autoregressive models only.

    Each block of queries first chooses frames from between the sinks and the near past, then blocks from all frames
    that are left to it; a score is the product of mean query and mean key. Blocks end with their frame. Sinks, the
    near past and the block in work may be chosen, and always are only if forced.
    """

    name: ClassVar[str] = "light_forcing"
    source: ClassVar[str] = "Light Forcing, arXiv:2602.04789"
    has_bidirectional_form: ClassVar[bool] = False

    sparsity: float = 0.85  # share of key blocks left out, over the whole video
    base_sparsity: float | None = None  # of the last blocks of an endless video; none: sparsity + 0.1, at most 0.99
    num_frames: int = 63  # latent frames the schedule is made for; later blocks are as sparse as the last
    num_context_frames: int | None = 12  # most frames the cache gives; none: all
    num_kept_frames: int = 3  # frames of the past that a query block may choose from, sinks and near ones included
    num_sink_frames: int = 1  # first frames of what the cache gives
    num_near_frames: int = 1  # last frames before the block in work
    block_size: int = 64  # keys of a block
    query_block_size: int | None = None  # queries that choose together; none: as block_size
    force: tuple[Literal["own", "sink", "near", "current"], ...] = ()  # blocks chosen before all others

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity <= self._base < 1:
            raise ValueError(
                f"sparsity={self.sparsity} and base_sparsity={self.base_sparsity}: "
                "both must be from 0 to below 1, and base_sparsity not the smaller one."
            )
        self._check_least(0, "num_sink_frames", "num_near_frames")
        self._check_least(1, "num_frames", "block_size")
        for name in ("query_block_size", "num_context_frames"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more, or none.")
        needed = self.num_sink_frames + self.num_near_frames
        if self.num_kept_frames < needed:
            raise ValueError(
                f"num_kept_frames={self.num_kept_frames} has no room for num_sink_frames={self.num_sink_frames} and "
                f"num_near_frames={self.num_near_frames}: use {needed} or more."
            )

    @property
    def _base(self) -> float:
        return max(self.sparsity, min(self.sparsity + 0.1, 0.99)) if self.base_sparsity is None else self.base_sparsity

    def block_sparsity(self, block_index: int, frames_per_block: int) -> float:
        """Share of the key blocks that a block of the rollout leaves out."""
        schedule = _growth_schedule(self, frames_per_block)
        return schedule[min(block_index, len(schedule) - 1)]

    def token_plan(self, tokens: Tokens, geometry: AttentionGeometry, memory: Memory) -> BlockPlan | None:
        if geometry.frames_per_block is None:
            raise ValueError(
                "attention policy 'light_forcing' is for block-autoregressive models and has no bidirectional form: "
                "use radial, svg, svg2, paro or sliding_tile there."
            )
        sparsity = self.block_sparsity(geometry.block_index, geometry.frames_per_block)
        if sparsity == 0 or geometry.num_keys == geometry.num_queries:
            return None
        scene = _SCENES.get((self, geometry.layout), lambda: _Scene(self, geometry))
        queries = block_means(tokens.q, scene.q_edges)
        keys = block_means(shared_heads(tokens.k, tokens.q.shape[1]), scene.k_edges)
        is_eligible = scene.eligible(queries, keys)
        # A hair more than the product, so that 0.1 x 10 is one block.
        count = max(1, math.floor((1 - sparsity) * len(keys) + 1e-9))
        scores = torch.einsum("qhd,khd->hqk", queries, keys)
        tiers = torch.where(is_eligible, 1 - scene.forced.to(scores.device, torch.long), 2)
        chosen = _best(scores, is_eligible.sum(-1).clamp(max=count), tiers=tiers)
        return BlockPlan.from_dense_block_mask(chosen.cpu(), scene.q_edges, scene.k_edges)


class _Scene:
    """Frames and blocks there are to choose from; follows from the layout alone."""

    def __init__(self, policy: LightForcing, geometry: AttentionGeometry) -> None:
        self.policy, self.geometry = policy, geometry
        self.own = geometry.own_segments()
        whole = [index for index, segment in enumerate(geometry.segments) if geometry.is_whole(segment)]
        frames = [index for index in whole if index not in self.own]
        self.sinks = frames[: policy.num_sink_frames]
        self.near = frames[max(len(frames) - policy.num_near_frames, len(self.sinks)) :]
        self.middle = [index for index in frames if index not in self.sinks and index not in self.near]
        self.num_frames = len(frames)
        self.k_edges = split_runs(geometry.key_lengths, policy.block_size)
        self.q_edges = split_runs(geometry.query_lengths, policy.query_block_size or policy.block_size)
        ends = torch.tensor([segment.stop for segment in geometry.segments])
        self.segment_of = torch.searchsorted(ends, self.k_edges[:-1].long(), right=True)

    def eligible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(heads, query blocks, key blocks), bool: blocks that are left after frames have been chosen."""
        device, num_segments = keys.device, len(self.geometry.segments)
        means = _merged_means(keys, self.k_edges.diff().to(device), self.segment_of.to(device), num_segments)
        scores = torch.einsum("qhd,fhd->hqf", queries, means)
        # Sinks, near past, the block in work, and whatever is no whole frame, may always be chosen from.
        is_open = torch.ones_like(scores, dtype=torch.bool)
        if self.num_frames > self.policy.num_kept_frames:
            room = self.policy.num_kept_frames - len(self.sinks) - len(self.near)
            is_open[..., self.middle] = _best(scores[..., self.middle], room)
        return is_open[..., self.segment_of.to(device)]

    @cached_property
    def forced(self) -> Tensor:
        """(query blocks, key blocks), bool: blocks that are chosen first."""
        groups = {"sink": self.sinks, "near": self.near, "current": self.own}
        segments = [index for name in self.policy.force if name != "own" for index in groups[name]]
        is_forced = torch.isin(self.segment_of, torch.tensor(segments, dtype=torch.long))
        is_forced = is_forced.expand(len(self.q_edges) - 1, -1).clone()
        if "own" in self.policy.force:
            start = self.geometry.segments[self.own[0]].start
            first, last = (edges.long()[:, None] + start for edges in (self.q_edges[:-1], self.q_edges[1:]))
            is_forced |= (self.k_edges[1:] > first) & (self.k_edges[:-1] < last)
        return is_forced


_SCENES: Recent[_Scene] = Recent(16)  # blocks of several rollouts that take turns


@cache
def _growth_schedule(policy: LightForcing, frames_per_block: int) -> tuple[float, ...]:
    """Chunk-aware growth: the sparsity of every block of a video, whose mean over all that is read is ``sparsity``.

    The first block has 0. The released code takes 1 / sqrt(frames so far) for the noise of a block.
    """
    base, window = policy._base, policy.num_context_frames
    ends = [(index + 1) * frames_per_block for index in range(1, policy.num_frames // frames_per_block)]
    lengths = [end if window is None else min(end, window) for end in ends]
    noise = [1 / math.sqrt(end) for end in ends]
    weight = sum(a * length for a, length in zip(noise, lengths, strict=True))
    beta = (base - policy.sparsity) * sum(lengths) / weight if ends else 0.0
    limit = math.nextafter(1, 0)
    return (0.0, *(min(max(base - a * beta, 0.0), limit) for a in noise))


def _merged_means(means: Tensor, sizes: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Average (blocks, heads, head_dim) means over groups of blocks, each block by its size."""
    sizes = sizes.to(means)[:, None, None]
    return sum_by_group(means * sizes, group, num_groups) / sum_by_group(sizes, group, num_groups)


def _best(scores: Tensor, count: Tensor | int, *, tiers: Tensor | None = None) -> Tensor:
    """Select the ``count`` best of (..., entries) scores, higher is better; of equal ones the first.

    ``count`` is for all rows or (...,) for each. Entries of a lower one of the (..., entries) ``tiers`` come before
    all of a higher one, whatever their score.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    if tiers is not None:
        by_tier = tiers.expand_as(scores).gather(-1, order).argsort(dim=-1, stable=True)
        order = order.gather(-1, by_tier)
    count = torch.as_tensor(count, device=scores.device)[..., None]
    is_taken = torch.arange(scores.shape[-1], device=scores.device).expand_as(order) < count
    return torch.zeros_like(is_taken).scatter_(-1, order, is_taken)
