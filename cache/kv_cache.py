"""The cache that the model talks to: assembles what a pass reads, attends, and lets the policy store.

Per layer there is one scratch buffer, [context | block]; where heads read different things, one per group of heads.
The context is gathered from the policy's storage and rotated once per block; the block's own keys and values are
written into the tail at every pass. Where storage is encoded or far away, one buffer serves all layers and is gathered
at every pass.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from longtake.cache.base import (
    BlockTrace,
    CachePolicy,
    CacheStats,
    Context,
    EncodeJob,
    Geometry,
    HeadGroup,
    Number,
    Pass,
)
from longtake.rope import GridRotary, apply_phases, axis_frequencies


@dataclass(frozen=True)
class Run:
    """Tokens of a read set that were read together."""

    num_tokens: int  # how many
    frames: tuple[int, ...]  # frames of the video that they come from; as of ``Read``
    # Temporal position of each whole frame; empty where every token has coordinates of its own
    positions: tuple[float, ...]
    role: str  # sink, recent, mid, memory, ...


@dataclass(frozen=True)
class Call:
    """One attention call: queries of a pass over ``runs`` and the pass's own tokens behind them."""

    layer: int  # self-attention layer, from 0
    pass_: Pass  # what the forward is
    runs: tuple[Run, ...]  # what is read of the cache, in the order of the keys
    query_positions: tuple[float, ...]  # temporal position of each frame of the pass
    heads: tuple[int, ...] | None = None  # the heads at hand, where heads read different things


class SparseAttention(Protocol):
    """Attention of one rollout's cache that may leave blocks of keys out."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: Call, bias: Tensor | None) -> Tensor:
        """Attend from ``q`` to the call's runs and the pass's own tokens, in this order in ``k`` and ``v``.

        All are (batch, tokens, heads, head_dim), q and k rotated, the result as ``q``; ``bias`` is (batch, heads, 1,
        keys), added to the scores.
        """
        ...


Attention = Callable[..., Tensor]
"""Dense attention (q, k, v, bias=None) of (batch, tokens, heads, head_dim); ``bias``: (batch or 1, heads, 1, keys)."""


@dataclass
class _Scratch:
    """The read set of some heads of a layer: (batch, tokens, heads, head_dim) buffers and what their head holds."""

    keys: Tensor
    values: Tensor
    heads: tuple[int, ...] | None
    num_context_tokens: int = 0
    bias: Tensor | None = None
    runs: tuple[Run, ...] = ()


@dataclass
class _ReadSet:
    """The assembled reads of a layer, for the passes that share them."""

    parts: list[_Scratch]  # one for every group of heads; none where read sets do not stay
    pass_: Pass  # the pass that asked
    context: Context  # what the policy selected; without its reads where ``parts`` stay

    def serves(self, pass_: Pass) -> bool:
        own, holds = self.pass_, self.context.holds
        if (own.block_index, own.num_frames) != (pass_.block_index, pass_.num_frames) or pass_.kind == "encode":
            return False
        return holds == "block" or (holds == "kind" and own.kind == pass_.kind)


class KVCache:
    """Keys and values of one rollout (one guidance branch), kept by a policy.

    Args:
        policy: What to keep and read.
        geometry: Shapes of the rollout.
        attention: Dense attention.
        sparse: Takes its place in passes of the rollout's blocks; passes that a policy asked for stay dense.
        phase_dtype: Of the rotation: complex64, or complex128 for products in float64.
    """

    def __init__(
        self,
        policy: CachePolicy,
        geometry: Geometry,
        *,
        attention: Attention,
        sparse: SparseAttention | None = None,
        phase_dtype: torch.dtype = torch.complex64,
    ) -> None:
        self.policy = policy
        self.geometry = geometry
        self.state = policy.start(geometry)
        self.attention = attention
        self.sparse = sparse
        self._rotary = GridRotary(
            axis_frequencies(geometry.head_dim),
            num_rows=geometry.num_rows,
            num_columns=geometry.num_columns,
            device=geometry.device,
            dtype=phase_dtype,
        )
        self._read_sets: dict[int, _ReadSet] = {}
        self._shared: list[_Scratch] = []

    @property
    def merges_commit(self) -> bool:
        """True where a commit may share a forward with the next block's first denoising pass."""
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
        read_set = self._assemble(layer, q, pass_)
        context = read_set.context
        phases = self._rotary.phases(context.query_positions)
        rotated = apply_phases(q, phases)
        own = slice(None)
        if context.num_own_frames is not None:
            own = slice(q.shape[1] // pass_.num_frames * (pass_.num_frames - context.num_own_frames), None)
        call = self._call(layer, pass_, context)
        if len(read_set.parts) == 1 and read_set.parts[0].heads is None:
            out = self._attend(read_set.parts[0], rotated, k[:, own], v[:, own], phases[..., own, :], call)
        else:
            out = torch.empty_like(q)
            for part in read_set.parts:
                heads = list(part.heads or ())
                own_kv = k[:, own, heads], v[:, own, heads]
                out[:, :, heads] = self._attend(part, rotated[:, :, heads], *own_kv, phases[..., own, :], call)
        if pass_.kind != "denoise":
            self.state.commit(layer, pass_, q, k, v)
        return out

    def end_block(self, trace: BlockTrace) -> list[EncodeJob]:
        return self.state.end_block(trace)

    def stats(self) -> CacheStats:
        return self.state.stats()

    @property
    def num_scratch_bytes(self) -> int:
        """Bytes of the rotated read sets: of all layers, or of one where they do not stay."""
        parts = [*self._shared, *(part for read_set in self._read_sets.values() for part in read_set.parts)]
        return sum(part.keys.nbytes + part.values.nbytes for part in parts)

    def state_dict(self) -> dict[str, Tensor | Number]:
        """The policy's state; scratch is rebuilt from it."""
        return self.state.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._read_sets.clear()
        self.state.load_state_dict(state)

    def _call(self, layer: int, pass_: Pass, context: Context) -> Call | None:
        """Describe a pass to sparse attention, where it is one of whole frames that all see each other."""
        is_plain = context.num_own_frames is None and pass_.kind != "encode" and pass_.grid is None
        if self.sparse is None or not is_plain or isinstance(context.query_positions, Tensor):
            return None
        return Call(layer, pass_, (), context.query_positions)

    def _attend(self, part: _Scratch, q: Tensor, k: Tensor, v: Tensor, phases: Tensor, call: Call | None) -> Tensor:
        start = part.num_context_tokens
        end = start + k.shape[1]
        apply_phases(k, phases, out=part.keys[:, start:end])
        part.values[:, start:end] = v
        if call is not None and self.sparse is not None:
            bias = None if part.bias is None else part.bias[..., :end]
            call = replace(call, runs=part.runs, heads=part.heads)
            return self.sparse(q, part.keys[:, :end], part.values[:, :end], call, bias)
        if part.bias is None:
            return self.attention(q, part.keys[:, :end], part.values[:, :end])
        return self.attention(q, part.keys[:, :end], part.values[:, :end], part.bias[..., :end])

    def _assemble(self, layer: int, q: Tensor, pass_: Pass) -> _ReadSet:
        known = self._read_sets.get(layer)
        fitting = known if known is not None and known.serves(pass_) else None
        if fitting is not None and fitting.parts:
            return fitting
        context = self.state.select(layer, pass_, q) if fitting is None else fitting.context
        # Encode passes are rare and large: all layers share one read set, so that none of it stays.
        stays = self.state.keeps_read_sets and pass_.kind != "encode"
        groups = context.groups or (context,)
        old = (known.parts if known is not None else []) if stays else self._shared
        scratches: list[_Scratch | None] = [*old] if len(old) == len(groups) else [None] * len(groups)
        parts = [self._part(scratch, group, q.shape[1]) for scratch, group in zip(scratches, groups, strict=True)]
        read_set = _ReadSet(parts, pass_, replace(context, reads=(), groups=()))
        if stays:
            self._read_sets[layer] = read_set
        else:
            self._shared = parts
            if pass_.kind != "encode":
                self._read_sets[layer] = _ReadSet([], pass_, context)
        return read_set

    def _part(self, scratch: _Scratch | None, source: Context | HeadGroup, num_own: int) -> _Scratch:
        """Gather one group's reads, into the buffers of the last time if they are large enough."""
        heads = source.heads if isinstance(source, HeadGroup) else None
        num_context = sum(read.stored.num_tokens for read in source.reads)
        num_tokens = num_context + num_own
        if scratch is None or scratch.keys.shape[1] < num_tokens or scratch.heads != heads:
            # A bounded policy says how far its context grows; doubling keeps an unbounded one's allocations few, up to
            # the whole video.
            bound = source.capacity + num_own if source.capacity else self._doubled(scratch)
            num_heads = self.geometry.num_heads if heads is None else len(heads)
            num_places = max(num_tokens, bound)
            scratch = _Scratch(self._empty(num_places, num_heads), self._empty(num_places, num_heads), heads)
        scratch.num_context_tokens = num_context
        scratch.bias = self._bias(scratch, source)
        start, runs = 0, []
        for read in source.reads:
            stored, positions = read.stored, () if isinstance(read.positions, Tensor) else read.positions
            runs.append(Run(stored.num_tokens, read.frames, positions, read.role))
            keys = stored.keys
            end = start + keys.shape[1]
            apply_phases(keys, self._rotary.phases(read.positions), out=scratch.keys[:, start:end])
            scratch.values[:, start:end] = stored.values
            start = end
        scratch.runs = tuple(runs)
        return scratch

    def _doubled(self, scratch: _Scratch | None) -> int:
        doubled = 2 * scratch.keys.shape[1] if scratch is not None else 0
        longest = self.geometry.max_frames
        return doubled if longest is None else min(doubled, longest * self.geometry.tokens_per_frame)

    def _bias(self, scratch: _Scratch, source: Context | HeadGroup) -> Tensor | None:
        if all(read.bias is None for read in source.reads):
            return None
        num_heads = scratch.keys.shape[2]
        shape = (self.geometry.batch_size, num_heads, 1, scratch.keys.shape[1])
        bias = torch.zeros(shape, dtype=self.geometry.dtype, device=self.geometry.device)
        start = 0
        for read in source.reads:
            end = start + read.stored.num_tokens
            if read.bias is not None:
                bias[:, :, 0, start:end] = read.bias
            start = end
        return bias

    def _empty(self, num_tokens: int, num_heads: int) -> Tensor:
        # Head after head in memory, as fused attention reads it (an eighth faster on the CPU than token after token).
        g = self.geometry
        buffer = torch.empty((g.batch_size, num_heads, num_tokens, g.head_dim), dtype=g.dtype, device=g.device)
        return buffer.transpose(1, 2)
