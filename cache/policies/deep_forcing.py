"""A deep sink that moves along with the video, and compression of what lies between sink and present."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from longtake.cache.base import (
    CachePolicy,
    CacheStats,
    Context,
    Geometry,
    Number,
    Pass,
    PolicyState,
    Read,
    Traits,
    check_room,
)
from longtake.cache.frames import FramePlan, FramePolicy, FrameState, ends
from longtake.cache.storage import ChosenTokens, coordinates, saved_part, take_tokens, token_numbers
from longtake.rope import GridRotary, apply_phases, axis_frequencies

_NUM_STARTS = 16  # compressions that are looked back on to say where kept tokens come from, where reuse has no limit
_CHUNK_QUERIES = 256  # scored at a time, where every query has its own say


@dataclass(frozen=True, kw_only=True)
class DeepForcing(CachePolicy):
    """Deep sink with temporal re-alignment and participative compression (Deep Forcing, arXiv:2512.05081).

    About half of the window is sink, which moves along in time. When a block no longer fits, the tokens between the
    sink and the recent frames are scored by the recent queries, all heads summed, per layer and video, and only the
    best stay: as many as ``num_budget_frames`` leaves room for, none where it leaves none.

    The defaults do what the released code does, which differs from the paper: the sink moves only when something is
    compressed (every second block at the published sizes) and stays a block's length short of what follows it; kept
    tokens stay at their own frames, and are kept seven times at most. ``positions: contiguous`` closes the gap,
    ``unify_top`` lays the kept tokens out between the sink and the recent frames, as the paper describes.
    ``compression: none`` is the deep sink alone: the window slides, and the sink moves with every block.

    Differs from the release: nothing is left over from an earlier video; a token kept too often stays where its place
    would be empty; windows other than 21 frames move the sink by what compression takes of them. If more than two
    blocks are recent, their queries come from commits alone.
    """

    name: ClassVar[str] = "deep_forcing"
    source: ClassVar[str] = "Deep Forcing, arXiv:2512.05081"

    compression: Literal["participative", "none"] = "participative"
    num_context_frames: int = 21  # most frames attended: sink, kept tokens, history and the block itself
    num_sink_frames: int = 10
    num_budget_frames: int = 16  # what a compression leaves of them, the block included
    num_recent_frames: int = 4  # never compressed, and asked for the scores; the block included
    positions: Literal["released", "contiguous"] = "released"
    unify_top: bool = False
    fusion: Literal["sum", "max"] = "sum"  # of recent queries' scores of a token
    max_reuse: int = 7  # compressions that a token survives; 0: any number

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "num_sink_frames", "max_reuse")
        if self.compression == "none":
            return
        if self.num_budget_frames > self.num_context_frames:
            raise ValueError(
                f"num_budget_frames={self.num_budget_frames} is what compression leaves of "
                f"num_context_frames={self.num_context_frames}: use {self.num_context_frames} or fewer."
            )
        content = f"num_sink_frames={self.num_sink_frames} and num_recent_frames={self.num_recent_frames}"
        check_room(self.num_context_frames, self.num_sink_frames + self.num_recent_frames, content)

    @property
    def num_kept_frames(self) -> int:
        """Frames' worth of tokens that a compression chooses: what the budget has beside sink and recent frames."""
        return max(self.num_budget_frames - self.num_sink_frames - self.num_recent_frames, 0)

    @property
    def traits(self) -> Traits:
        return Traits(breaks_frames=self.compression == "participative")

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        if self.compression == "participative" and self.num_recent_frames < frames_per_block:
            raise ValueError(
                f"num_recent_frames={self.num_recent_frames} counts the block itself, which has {frames_per_block} "
                f"frames: use {frames_per_block} or more."
            )
        content = f"num_sink_frames={self.num_sink_frames} and a block of {frames_per_block} frames"
        check_room(self.num_context_frames, self.num_sink_frames + frames_per_block, content)

    def start(self, geometry: Geometry) -> PolicyState:
        self.check(geometry.frames_per_block, geometry.max_frames)
        if self.compression == "none":
            return FrameState(_DeepSink(own=self), geometry)
        return _ParticipativeState(self, geometry)

    def sink_shift(self, elapsed: int, num_frames: int) -> int:
        """Frames by which the sink moves for a block that does not fit any more, ``elapsed`` frames into the video."""
        left = self.num_context_frames if self.compression == "none" else self.num_budget_frames
        if self.positions == "contiguous":
            least = 0 if self.compression == "none" else self.num_sink_frames + self.num_recent_frames
            return elapsed + num_frames - max(left, least)
        # The released code starts to count at the first block that did not fit, wherever that was.
        since = (elapsed + num_frames - self.num_context_frames - 1) // num_frames * num_frames
        return self.num_context_frames - left + since


@dataclass(frozen=True, kw_only=True)
class _DeepSink(FramePolicy):
    """The deep sink alone: whole frames, a window that slides and a sink that follows it."""

    name: ClassVar[str] = DeepForcing.name
    source: ClassVar[str] = DeepForcing.source
    own: DeepForcing

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        self.own.check(frames_per_block, num_frames)

    def num_read_frames(self, frames_per_block: int) -> int | None:
        return self.own.num_context_frames - frames_per_block

    def roles(self, frames: tuple[int, ...]) -> tuple[str, ...]:
        num_sinks = min(self.own.num_sink_frames, len(frames))
        return ("sink",) * num_sinks + ("recent",) * (len(frames) - num_sinks)

    def keep(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> tuple[int, ...]:
        num_sinks = min(self.own.num_sink_frames, len(stored))
        return ends(stored, num_sinks, self.own.num_context_frames - num_frames - num_sinks)

    def read(self, kept: tuple[int, ...], start_frame: int, num_frames: int) -> FramePlan:
        plan = FramePlan.absolute(kept, start_frame, num_frames)
        elapsed = start_frame - kept[0] if kept else 0
        if elapsed + num_frames <= self.own.num_context_frames:
            return plan
        num_sinks, shift = self.own.num_sink_frames, self.own.sink_shift(elapsed, num_frames)
        moved = tuple(position + shift for position in plan.positions[:num_sinks])
        return replace(plan, positions=moved + plan.positions[num_sinks:])


@dataclass
class _Layer:
    """One layer's tokens. Numbers are the same in all layers once a block has committed in all of them."""

    origin: int = 0  # first frame of the video
    end: int = 0  # frame after the last stored one
    num_frames: int = 0  # frames' worth of stored tokens
    num_kept: int = 0  # of these the kept tokens, frames' worth
    shift: int = 0  # what the sink's positions are ahead of its frames
    top: int = 0  # position of the first kept token, where they are laid out anew
    starts: tuple[int, ...] = ()  # first whole frame that was up for compression, each of the last times
    numbers: Tensor | None = None  # (batch, kept tokens), which ones they are
    uses: Tensor | None = None  # same shape, how often each was kept
    # Of the last committed frames, rotated: (batch, frames, heads, head_dim) sums in float32, or (batch, frames *
    # tokens, heads, head_dim) where every query has its own say
    queries: Tensor | None = None
    choice: Tensor | None = None  # (batch, kept tokens) among the candidates, for the block at ``chosen_for``
    chosen_for: int = -1
    is_guess: bool = False  # the choice was made without queries


_NUMBERS = ("origin", "end", "num_frames", "num_kept", "shift", "top", "chosen_for", "is_guess")
_TENSORS = ("numbers", "uses", "queries", "choice")


class _ParticipativeState(PolicyState):
    """The buffer of sink, kept tokens and recent frames, and what is known of the tokens."""

    def __init__(self, policy: DeepForcing, geometry: Geometry) -> None:
        self.policy = policy
        self.geometry = geometry
        self.size = geometry.tokens_per_frame
        self.buffer = geometry.storage.buffer(geometry, policy.num_context_frames * self.size)
        self.num_top = policy.num_kept_frames
        self._layers = [_Layer() for _ in range(geometry.num_layers)]
        self._rotary = GridRotary(
            axis_frequencies(geometry.head_dim),
            num_rows=geometry.num_rows,
            num_columns=geometry.num_columns,
            device=geometry.device,
        )
        self._span: tuple[float, float] | None = None

    def select(self, layer: int, pass_: Pass, q: Tensor | None = None) -> Context:
        """Read everything that is stored; or, where that and the block no longer fit, what compression leaves."""
        held, start, size = self._layers[layer], pass_.start_frame, self.size
        after = range(start, start + pass_.num_frames)
        num_sinks = min(self.policy.num_sink_frames, held.num_frames)
        shift, top, num_kept = held.shift, held.top, held.num_kept
        first = num_sinks + num_kept  # of the recent frames, among the stored ones
        numbers, index = held.numbers, None
        if self._overflows(held, pass_):
            index = self._choice(layer, pass_, q)
            shift = self.policy.sink_shift(start - held.origin, pass_.num_frames)
            top, num_kept = self._top(after.stop), self.num_top
            first = held.num_frames - self._num_staying(pass_)
            numbers = take_tokens(self._candidates(held, pass_), index) if num_kept else None
        reads = []
        if num_sinks:
            stored = self.buffer.read(layer, 0, num_sinks * size)
            reads.append(Read.of_frames(stored, range(held.origin, held.origin + num_sinks), "sink", shift=shift))
        if num_kept and numbers is not None:
            stored = self.buffer.read(layer, num_sinks * size, first * size)
            if index is not None:
                stored = ChosenTokens(stored, index)
            newest = start - (held.num_frames - first)
            frames = tuple(range(min(held.starts, default=held.origin + num_sinks), newest))
            reads.append(Read(stored, self._kept_positions(numbers, top), frames=frames, role="mid"))
        if first < held.num_frames:
            stored = self.buffer.read(layer, first * size, held.num_frames * size)
            reads.append(Read.of_frames(stored, range(start - (held.num_frames - first), start), "recent"))
        lowest = min((held.origin + shift, *(read.frames[0] for read in reads if read.role != "sink"), start))
        self._span = (float(lowest), float(after.stop - 1))
        capacity = (self.policy.num_context_frames - pass_.num_frames) * size
        return Context(tuple(reads), tuple(map(float, after)), capacity=capacity)

    def commit(self, layer: int, pass_: Pass, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Drop what the block did not read, store the block behind the rest, and remember its queries."""
        held, start = self._layers[layer], pass_.start_frame
        if held.num_frames == 0:
            held.origin = start
        if self._overflows(held, pass_):
            self._compress(layer, pass_, q)
        self.buffer.write(layer, held.num_frames * self.size, k, v)
        held.num_frames += pass_.num_frames
        held.end = start + pass_.num_frames
        held.choice, held.chosen_for, held.is_guess = None, -1, False
        num_needed = self.policy.num_recent_frames - self.geometry.frames_per_block
        if num_needed > 0:
            new = self._rotated(q, pass_)
            if self.policy.fusion == "sum":
                new = new.float().unflatten(1, (pass_.num_frames, self.size)).sum(dim=2)
            known = new if held.queries is None else torch.cat((held.queries, new), dim=1)
            num_rows = num_needed * (1 if self.policy.fusion == "sum" else self.size)
            held.queries = known[:, max(known.shape[1] - num_rows, 0) :].clone()

    def stats(self) -> CacheStats:
        held = self._layers[-1]
        num_sinks = min(self.policy.num_sink_frames, held.num_frames)
        counts = {"sink": num_sinks, "mid": held.num_kept, "recent": held.num_frames - num_sinks - held.num_kept}
        tokens = {role: count * self.size for role, count in counts.items() if count}
        bytes_ = {role: count * self.buffer.bytes_per_token for role, count in tokens.items()}
        return CacheStats(tokens=tokens, bytes=bytes_, positions=self._span)

    def state_dict(self) -> dict[str, Tensor | Number]:
        held = self._layers[0]
        state: dict[str, Tensor | Number] = {name: getattr(held, name) for name in _NUMBERS}
        state["starts"] = torch.tensor(held.starts).long()
        for layer, held in enumerate(self._layers):
            state |= {f"{name}.{layer}": getattr(held, name) for name in _TENSORS if getattr(held, name) is not None}
            if held.num_frames:
                saved = self.buffer.save(layer, 0, held.num_frames * self.size)
                state |= {f"stored.{name}.{layer}": tensor for name, tensor in saved.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["num_frames"] > self.policy.num_context_frames:
            raise ValueError(
                f"the saved cache holds {state['num_frames']} frames, this policy stores "
                f"{self.policy.num_context_frames}: resume with the cache settings it was saved with."
            )
        numbers: dict[str, Any] = {name: state[name] for name in _NUMBERS} | {
            "starts": tuple(state["starts"].tolist())
        }
        for layer in range(self.geometry.num_layers):
            tensors = {name: state[f"{name}.{layer}"] for name in _TENSORS if f"{name}.{layer}" in state}
            tensors = {name: tensor.to(self.geometry.device) for name, tensor in tensors.items()}
            self._layers[layer] = _Layer(**numbers, **tensors)
            if saved := saved_part(state, "stored.", f".{layer}"):
                self.buffer.load(layer, 0, saved)

    def _overflows(self, held: _Layer, pass_: Pass) -> bool:
        return held.num_frames + pass_.num_frames > self.policy.num_context_frames

    def _num_staying(self, pass_: Pass) -> int:
        return self.policy.num_recent_frames - pass_.num_frames

    def _top(self, end: int) -> int:
        return end - self.policy.num_recent_frames - self.num_top

    def _kept_positions(self, numbers: Tensor, top: int) -> Tensor:
        positions = coordinates(numbers, self.geometry)
        if self.policy.unify_top:
            places = torch.arange(numbers.shape[1], device=numbers.device)
            positions[..., 0] = top + (places // self.size).double()
        return positions

    def _fresh(self, held: _Layer, pass_: Pass) -> range:
        """Whole frames that may be dropped: those behind the kept tokens, without the recent ones."""
        first = held.end - (held.num_frames - self.policy.num_sink_frames - held.num_kept)
        return range(first, held.end - self._num_staying(pass_))

    def _candidates(self, held: _Layer, pass_: Pass) -> Tensor:
        """Numbers of what may be dropped: the kept tokens and the older of the whole frames."""
        frames = self._fresh(held, pass_)
        fresh = token_numbers(self.geometry, frames.start, len(frames))
        return fresh if held.numbers is None else torch.cat((held.numbers, fresh), dim=1)

    def _choice(self, layer: int, pass_: Pass, q: Tensor | None) -> Tensor:
        """Choose the candidates that stay: (batch, tokens), ascending. Made once per block."""
        held = self._layers[layer]
        if held.choice is not None and held.chosen_for == pass_.start_frame and (q is None or not held.is_guess):
            return held.choice
        numbers = self._candidates(held, pass_)
        if q is None:
            scores = torch.arange(numbers.shape[1], device=numbers.device).expand_as(numbers).float()
        else:
            scores = self._scores(layer, pass_, q, numbers)
        if self.policy.max_reuse and held.uses is not None:
            num_kept = held.uses.shape[1]
            scores[:, :num_kept].masked_fill_(held.uses >= self.policy.max_reuse, torch.finfo(scores.dtype).min)
        held.choice = scores.topk(self.num_top * self.size, dim=1).indices.sort(dim=1).values
        held.chosen_for, held.is_guess = pass_.start_frame, q is None
        return held.choice

    def _scores(self, layer: int, pass_: Pass, q: Tensor, numbers: Tensor) -> Tensor:
        """(batch, candidates), float32: what the recent queries think of each, heads summed."""
        held, size = self._layers[layer], self.size
        first = self.policy.num_sink_frames
        keys = self.buffer.read(layer, first * size, first * size + numbers.shape[1]).keys.float()
        phases = self._rotary.phases(tuple(map(float, self._fresh(held, pass_)))).expand(numbers.shape[0], -1, -1)
        if held.numbers is not None:
            known = self._rotary.phases(coordinates(held.numbers, self.geometry))
            phases = torch.cat((known, phases), dim=1)
        queries = self._rotated(q, pass_).float()
        num_rows = self._num_staying(pass_) * (1 if self.policy.fusion == "sum" else size)
        known = None if held.queries is None else held.queries[:, max(held.queries.shape[1] - num_rows, 0) :].float()
        if self.policy.fusion == "sum":
            total = queries.sum(dim=1) if known is None else queries.sum(dim=1) + known.sum(dim=1)
            # q . R k = Re(conj(q) k phase) per pair of channels: heads are summed before anything is rotated.
            pairs = torch.view_as_complex(keys.unflatten(-1, (-1, 2)))
            asked = torch.view_as_complex(total.unflatten(-1, (-1, 2))).conj()
            return (torch.einsum("bnhp,bhp->bnp", pairs, asked) * phases).real.sum(dim=-1)
        queries = queries if known is None else torch.cat((known, queries), dim=1)
        rotated = apply_phases(keys, phases).flatten(2).mT
        best = [part.flatten(2).matmul(rotated).amax(dim=1) for part in queries.split(_CHUNK_QUERIES, dim=1)]
        return torch.stack(best).amax(dim=0)

    def _rotated(self, q: Tensor, pass_: Pass) -> Tensor:
        frames = range(pass_.start_frame, pass_.start_frame + pass_.num_frames)
        return apply_phases(q, self._rotary.phases(tuple(map(float, frames))))

    def _compress(self, layer: int, pass_: Pass, q: Tensor) -> None:
        """Put the kept tokens and the recent frames behind the sink."""
        held, size = self._layers[layer], self.size
        staying, num_sinks = self._num_staying(pass_), self.policy.num_sink_frames
        fresh = self._fresh(held, pass_).start
        if self.num_top:
            index = self._choice(layer, pass_, q)
            numbers = self._candidates(held, pass_)
            uses = torch.zeros_like(numbers)
            if held.uses is not None:
                uses[:, : held.uses.shape[1]] = held.uses
            self.buffer.move(layer, index + num_sinks * size, num_sinks * size)
            held.numbers, held.uses = take_tokens(numbers, index), take_tokens(uses, index) + 1
        if staying:
            places = range((held.num_frames - staying) * size, held.num_frames * size)
            last = torch.arange(places.start, places.stop, device=self.geometry.device)
            self.buffer.move(layer, last, (num_sinks + self.num_top) * size)
        held.shift = self.policy.sink_shift(pass_.start_frame - held.origin, pass_.num_frames)
        held.top = self._top(pass_.start_frame + pass_.num_frames)
        held.starts = (*held.starts, fresh)[-(self.policy.max_reuse or _NUM_STARTS) :]
        held.num_kept, held.num_frames = self.num_top, num_sinks + self.num_top + staying
