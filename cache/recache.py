"""Re-cache: the last frames encoded anew under a new prompt, for any policy of whole frames."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longtake.cache.base import BlockTrace, Context, EncodeJob, Geometry, Number, Pass
from longtake.cache.frames import FramePlan, FrameState, P


class RecacheState(FrameState[P]):
    """Whole frames, and the clean latents of the last ones, so that a new prompt can encode them again.

    As released by LongLive: one forward over the last ``num_frames`` clean frames, at the timestep of commit passes,
    in which every frame sees every other. The sinks outlive it and are read in place of the oldest of them, whose keys
    are neither seen nor stored. While the video is no longer than the window nothing outlives it: all is encoded anew.
    """

    def __init__(
        self,
        policy: P,
        geometry: Geometry,
        *,
        num_frames: int,  # window: sinks, recent past and a block
        num_sink_frames: int = 0,
        # Frames that are not recent outlive a re-cache; without, the oldest ones encoded anew become the sinks
        protects_sinks: bool = True,
        # Encode block by block, each seeing only what came before, as the rollout itself does
        is_causal: bool = False,
    ) -> None:
        super().__init__(policy, geometry)
        self.num_frames, self.num_sink_frames = num_frames, num_sink_frames
        self.protects_sinks = protects_sinks
        self.is_causal = is_causal
        self._latents: Tensor | None = None
        self._outlive: tuple[int, ...] = ()
        self._num_encoded = 0

    def end_block(self, trace: BlockTrace) -> list[EncodeJob]:
        """Remember the block's latents; encode the last ones again if the next prompt asks for it."""
        super().end_block(trace)
        latents = trace.latents if self._latents is None else torch.cat((self._latents, trace.latents), dim=1)
        self._latents = latents[:, -self.num_frames :]
        if trace.event != "recache":
            return []
        return self._recache(self._latents, trace.start_frame + trace.latents.shape[1])

    def select(self, layer: int, pass_: Pass, q: Tensor | None = None) -> Context:
        if pass_.kind != "encode" or self.is_causal:
            return super().select(layer, pass_, q)
        plan = self.plan(self._outlive, pass_.start_frame, pass_.num_frames)
        # The frames stand where they would without anything before them: what is read replaces the oldest of them.
        queries = self.plan((), pass_.start_frame, pass_.num_frames).query_positions
        return Context(
            self._reads(layer, FramePlan(self._outlive, plan.positions, queries, plan.roles), self._after),
            queries,
            holds="pass",
            capacity=self.store.num_slots * self.geometry.tokens_per_frame,
            num_own_frames=self._num_encoded,
        )

    def commit(self, layer: int, pass_: Pass, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Store a block, or the frames of a re-cache that the next block reads."""
        if pass_.kind != "encode" or self.is_causal:
            return super().commit(layer, pass_, q, k, v)
        end = pass_.start_frame + pass_.num_frames
        new = (f if f >= end - self._num_encoded else -1 for f in range(pass_.start_frame, end))
        self.store.write(layer, [self._after.get(f, -1) for f in new], k, v)

    def state_dict(self) -> dict[str, Tensor | Number]:
        state = super().state_dict()
        return state if self._latents is None else state | {"latents": self._latents.contiguous()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        latents = state.get("latents")
        self._latents = None if latents is None else latents.to(self.geometry.device)

    def _recache(self, latents: Tensor, end: int) -> list[EncodeJob]:
        """Let go of what does not outlive the re-cache, and ask for the forwards that fill its place."""
        num_frames, stored = latents.shape[1], tuple(sorted(self._after))
        protects = self.protects_sinks and num_frames < end
        self._num_encoded = min(num_frames, self.num_frames - self.num_sink_frames * protects)
        first = end - self._num_encoded
        roles = zip(stored, self.roles(stored), strict=True)
        self._outlive = tuple(f for f, role in roles if protects and role != "recent" and f < first)
        if not self.is_causal:
            at_hand = (*self._outlive, *range(first, end))
            self.assign(self.kept(at_hand, end, self.geometry.frames_per_block))
            return [EncodeJob(latents, end - num_frames, timestep=None, label="recache")]
        # Every frame that is encoded anew is new to the cache, whatever was committed before.
        self.assign(self._outlive)
        self._committed, self._plan = -1, None
        size = self.geometry.frames_per_block
        starts = [*range(end - size, first, -size), first][::-1]
        sizes = [b - a for a, b in zip(starts, [*starts[1:], end], strict=True)]
        parts = latents[:, -self._num_encoded :].split(sizes, dim=1)
        return [
            EncodeJob(part, start, timestep=None, label="recache") for part, start in zip(parts, starts, strict=True)
        ]
