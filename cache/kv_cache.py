"""The cache that the model talks to: assembles what a pass reads, attends, and lets the policy store.

Per layer there is one scratch buffer, [context | block]. The context is gathered from the policy's storage and
rotated once per block; the block's own keys and values are written into the tail at every pass.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.cache.base import BlockTrace, CachePolicy, CacheStats, Context, EncodeJob, Geometry, Number, Pass
from longtake.rope import GridRotary, apply_phases, axis_frequencies

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class _Scratch:
    """One layer's read set: (batch, tokens, heads, head_dim) buffers and what their head holds now."""

    keys: Tensor
    values: Tensor
    num_context_tokens: int = 0
    query_positions: tuple[float, ...] = ()
    block_index: int = -1
    holds: str = "pass"


class KVCache:
    """Keys and values of one rollout (one guidance branch), kept by a policy.

    Args:
        policy: What to keep and read.
        geometry: Shapes of the rollout.
        attention: Dense attention of (batch, tokens, heads, head_dim) tensors.
    """

    def __init__(self, policy: CachePolicy, geometry: Geometry, *, attention: Attention) -> None:
        self.policy = policy
        self.geometry = geometry
        self.state = policy.start(geometry)
        self.attention = attention
        self._rotary = GridRotary(
            axis_frequencies(geometry.head_dim),
            num_rows=geometry.num_rows,
            num_columns=geometry.num_columns,
            device=geometry.device,
        )
        self._scratch: dict[int, _Scratch] = {}

    @property
    def merges_commit(self) -> bool:
        """Whether a commit may share a forward with the next block's first denoising pass."""
        return self.state.merges_commit

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, pass_: Pass) -> Tensor:
        """Attend from a pass's tokens to what the policy reads and to themselves.

        Args:
            layer: Self-attention layer, from 0.
            q: (batch, frames * tokens_per_frame, heads, head_dim), un-rotated.
            k: Same shape, un-rotated.
            v: Same shape.
            pass_: What this forward is.

        Returns:
            Same shape as ``q``.
        """
        scratch = self._assemble(layer, pass_)
        phases = self._rotary.frames(scratch.query_positions)
        start = scratch.num_context_tokens
        end = start + q.shape[1]
        apply_phases(k, phases, out=scratch.keys[:, start:end])
        scratch.values[:, start:end] = v
        out = self.attention(apply_phases(q, phases), scratch.keys[:, :end], scratch.values[:, :end])
        if pass_.kind == "commit":
            self.state.commit(layer, pass_, q, k, v)
        return out

    def end_block(self, trace: BlockTrace) -> list[EncodeJob]:
        """Tell the policy that a block is committed in all layers."""
        return self.state.end_block(trace)

    def stats(self) -> CacheStats:
        """What is stored now."""
        return self.state.stats()

    @property
    def num_scratch_bytes(self) -> int:
        """Bytes of the rotated read sets of all layers."""
        return sum(s.keys.nbytes + s.values.nbytes for s in self._scratch.values())

    def state_dict(self) -> dict[str, Tensor | Number]:
        """The policy's state; scratch is rebuilt from it."""
        return self.state.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor | Number]) -> None:
        """Take over a saved state."""
        self._scratch.clear()
        self.state.load_state_dict(state)

    def _assemble(self, layer: int, pass_: Pass) -> _Scratch:
        scratch = self._scratch.get(layer)
        if scratch is not None and scratch.block_index == pass_.block_index and scratch.holds == "block":
            return scratch
        context = self.state.select(layer, pass_)
        num_context = sum(read.keys.shape[1] for read in context.reads)
        num_tokens = num_context + pass_.num_frames * self.geometry.tokens_per_frame
        if scratch is None or scratch.keys.shape[1] < num_tokens:
            # A bounded policy says how far its context grows; doubling keeps an unbounded one's allocations few.
            bound = context.capacity + num_tokens - num_context
            room = max(num_tokens, bound if context.capacity else 2 * (scratch.keys.shape[1] if scratch else 0))
            scratch = self._scratch[layer] = _Scratch(self._empty(room), self._empty(room))
        self._gather(scratch, context)
        scratch.num_context_tokens = num_context
        scratch.query_positions = context.query_positions
        scratch.block_index, scratch.holds = pass_.block_index, context.holds
        return scratch

    def _gather(self, scratch: _Scratch, context: Context) -> None:
        start = 0
        for read in context.reads:
            end = start + read.keys.shape[1]
            apply_phases(read.keys, self._rotary.frames(read.positions), out=scratch.keys[:, start:end])
            scratch.values[:, start:end] = read.values
            start = end

    def _empty(self, num_tokens: int) -> Tensor:
        # Head after head in memory, as fused attention reads it (an eighth faster on the CPU than token after token).
        g = self.geometry
        buffer = torch.empty((g.batch_size, g.num_heads, num_tokens, g.head_dim), dtype=g.dtype, device=g.device)
        return buffer.transpose(1, 2)
