"""Attention heads that look only at the near past, measured in rollouts that keep everything."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from longtake.cache import CachePolicy, Geometry, Pass
from longtake.cache.frames import FrameState
from longtake.cache.policies.forcing_kv import HeadMap
from longtake.cache.policies.full import Full
from longtake.rope import GridRotary, apply_phases, axis_frequencies

MAX_QUERIES = 256  # of a block, evenly spread: a share of attention needs no more


@dataclass
class HeadProfile:
    """Adds up how much of their attention heads give to the near past.

    Use ``policy`` as the cache of any rollouts of one model; each committed block counts once.

    Source: the share and its threshold of 0.8 are Forcing-KV's, arXiv:2605.09681.
    """

    num_skipped: int = 3  # first frames of a video whose attention does not count, since heads of all kinds look there
    num_recent: int = 1  # frames before a block that are near, beside the block itself
    _sums: Tensor | None = None
    _counts: Tensor | None = None

    @property
    def policy(self) -> CachePolicy:
        """A cache that keeps everything and is watched."""
        return _Watched(profile=self)

    @property
    def shares(self) -> Tensor:
        """(layers, heads), float64: mean share of the attention that goes to the last frame and the block itself."""
        if self._sums is None or self._counts is None or not self._counts.all():
            raise ValueError(
                f"no block had frames between the first {self.num_skipped} and the last {self.num_recent}: "
                "profile longer rollouts."
            )
        return self._sums / self._counts[:, None]

    def head_map(self, threshold: float = 0.8) -> HeadMap:
        """Call heads static whose share is ``threshold`` or more."""
        shares = self.shares
        static = tuple(tuple(torch.nonzero(row >= threshold).flatten().tolist()) for row in shares)
        return HeadMap(static, shares.shape[1])

    def add(self, layer: int, geometry: Geometry, shares: Tensor) -> None:
        """Count one block: the (heads,) shares of a layer."""
        if self._sums is None or self._counts is None:
            self._sums = torch.zeros((geometry.num_layers, geometry.num_heads), dtype=torch.float64)
            self._counts = torch.zeros(geometry.num_layers, dtype=torch.float64)
        self._sums[layer] += shares.double().cpu()
        self._counts[layer] += 1


@dataclass(frozen=True, kw_only=True)
class _Watched(Full):
    name: ClassVar[str] = "head_profile"
    source: ClassVar[str] = "Forcing-KV, arXiv:2605.09681"

    profile: HeadProfile = field(compare=False)

    def start(self, geometry: Geometry) -> "_WatchedState":
        return _WatchedState(self, geometry)


class _WatchedState(FrameState):
    def __init__(self, policy: _Watched, geometry: Geometry) -> None:
        super().__init__(policy, geometry)
        self._profile = policy.profile
        self._origin: int | None = None
        self._rotary = GridRotary(
            axis_frequencies(geometry.head_dim),
            num_rows=geometry.num_rows,
            num_columns=geometry.num_columns,
            device=geometry.device,
        )

    def commit(self, layer: int, pass_: Pass, q: Tensor, k: Tensor, v: Tensor) -> None:
        self._origin = pass_.start_frame if self._origin is None else self._origin
        profile = self._profile
        if self._origin + profile.num_skipped < pass_.start_frame - profile.num_recent:
            mass = self._frame_masses(layer, pass_, q, k)[..., profile.num_skipped :]
            near = mass[..., -(profile.num_recent + pass_.num_frames) :].sum(dim=-1)
            profile.add(layer, self.geometry, (near / mass.sum(dim=-1)).mean(dim=0))
        super().commit(layer, pass_, q, k, v)

    def _frame_masses(self, layer: int, pass_: Pass, q: Tensor, k: Tensor) -> Tensor:
        """(batch, heads, frames), float32: mean attention that a block's queries give to each frame up to its own."""
        size = self.geometry.tokens_per_frame
        context = self.select(layer, pass_, q)
        phases = self._rotary.phases(context.query_positions)
        parts = [(read.stored.keys, self._rotary.phases(read.positions)) for read in context.reads]
        order = [frame for read in context.reads for frame in read.frames]
        keys = torch.cat([apply_phases(keys, turns).float() for keys, turns in (*parts, (k, phases))], dim=1)
        stride = max(1, q.shape[1] // MAX_QUERIES)
        queries = apply_phases(q, phases)[:, ::stride].float()
        scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) * self.geometry.head_dim**-0.5
        masses = scores.softmax(dim=-1).mean(dim=2).unflatten(-1, (-1, size)).sum(dim=-1)
        # Stored frames lie in slots; in time order they say which of them are near.
        by_time = sorted(range(len(order)), key=order.__getitem__) + list(range(len(order), masses.shape[-1]))
        return masses[..., by_time]
