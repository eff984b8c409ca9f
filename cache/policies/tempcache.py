"""Tokens that repeat are kept once, and count as often as they came."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

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
from longtake.cache.storage import KeysValues, Stored, coordinates, saved_part, take_tokens, token_numbers

_SAME_PLACE = 1e-4  # what a token at the same place in the frame is ahead of an equally similar one elsewhere
_ROUNDING = 1e-6  # of the cosine of equal keys
_NUM_SHOWN = 64  # frames that a read may say it comes from: nearly all tokens are younger
_OF_TOKENS = ("numbers", "counts", "seen")  # which they are, what they count, where neighbours are sought


@dataclass(frozen=True, kw_only=True)
class TempCache(CachePolicy):
    """Merges keys that correspond to each other across time (TempCache of FAST-AR, arXiv:2602.01801).

    A new and a stored token whose keys are each other's nearest, with a cosine of ``min_similarity`` or more, become
    one: the new key and its position stay, the value is the mean over all that were merged, and the logarithm of their
    number is added to the scores, which is exact for equal keys.

    Differs from the paper: neighbours are found by un-rotated keys (rotated ones of equal content differ across time),
    in random directions of all heads together, and merged in all heads if they are similar in all channels. The cache
    is bounded. ``positions: clamped`` keeps what is older than the window at its edge, within the trained range.
    """

    name: ClassVar[str] = "tempcache"
    source: ClassVar[str] = "FAST-AR, arXiv:2602.01801"
    # Merged tokens are no frame's, and count for those that they stand for.
    traits: ClassVar[Traits] = Traits(breaks_frames=True, weighs_tokens=True)

    num_context_frames: int = 21  # everything attended, in frames' worth of tokens: history and the block itself
    min_similarity: float = 0.9  # of un-rotated keys
    num_projections: int = 64  # random directions; 0: all channels
    positions: Literal["absolute", "clamped"] = "clamped"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "num_context_frames")
        self.at_least(0, "num_projections", note="; 0 looks in all channels")
        if self.min_similarity <= 0:
            raise ValueError(f"min_similarity={self.min_similarity} must be more than 0; above 1 nothing is merged.")

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        check_room(self.num_context_frames, frames_per_block, f"a block of {frames_per_block} frames")

    def start(self, geometry: Geometry) -> "_TempCacheState":
        self.check(geometry.frames_per_block, geometry.max_frames)
        return _TempCacheState(self, geometry)


class _TempCacheState(PolicyState):
    """Per layer the tokens in the order of their last appearance; one that is merged into another counts 0."""

    def __init__(self, policy: TempCache, geometry: Geometry) -> None:
        self.policy, self.geometry, self.size = policy, geometry, geometry.tokens_per_frame
        self.num_read = (policy.num_context_frames - geometry.frames_per_block) * self.size
        # A block is stored behind all that could be read; only then the tokens that stay are moved up.
        self.buffer = geometry.storage.buffer(geometry, policy.num_context_frames * self.size)
        empty = torch.zeros((geometry.batch_size, 0), device=geometry.device)
        self._numbers = [empty.long()] * geometry.num_layers
        self._counts = [empty] * geometry.num_layers
        channels = geometry.num_heads * geometry.head_dim
        self._projection = _random_projection(channels, policy.num_projections, empty.to(geometry.dtype))
        # Kept, so that a commit looks at its own keys alone: 2 % of what a token of the 1.3B model takes.
        width = channels if self._projection is None else policy.num_projections
        self._seen = [empty.to(geometry.dtype)[..., None].expand(-1, -1, width)] * geometry.num_layers
        self._origin = -1
        self._span: tuple[float, float] | None = None

    def select(self, layer: int, pass_: Pass, q: Tensor | None = None) -> Context:
        """Read every token, those that count more than once with a bias, those that count no more with none."""
        numbers, start = self._numbers[layer], pass_.start_frame
        edge = start - self.num_read // self.size
        queries = tuple(float(frame) for frame in range(start, start + pass_.num_frames))
        is_clamped = self.policy.positions == "clamped"
        oldest = start if self._origin < 0 else min(max(self._origin, edge if is_clamped else 0), start)
        self._span = (float(oldest), queries[-1])
        if not numbers.shape[1]:
            return Context((), queries, capacity=self.num_read)
        positions = coordinates(numbers, self.geometry)
        if is_clamped:
            positions[..., 0].clamp_(min=edge)
        bias = self._counts[layer].log().to(self.geometry.dtype)[:, None].expand(-1, self.geometry.num_heads, -1)
        frames = tuple(range(max(self._origin, start - _NUM_SHOWN), start))
        stored = self.buffer.read(layer, 0, numbers.shape[1])
        return Context((Read(stored, positions, frames, "memory", bias),), queries, capacity=self.num_read)

    def commit(self, layer: int, pass_: Pass, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Merge the block frame by frame with what is stored, store it, and let the oldest tokens go."""
        self._origin = pass_.start_frame if self._origin < 0 else self._origin
        numbers, size = self._numbers[layer], self.size
        old = self.buffer.read(layer, 0, numbers.shape[1])
        seen = torch.cat((self._seen[layer], _directions(k, self._projection)), dim=1)
        known = seen, self._counts[layer], numbers % size
        least = self.policy.min_similarity
        values, counts = _merge_repeats(old, k, v, *known, tokens_per_frame=size, min_similarity=least)
        self.buffer.write(layer, numbers.shape[1], k, values)
        new = token_numbers(self.geometry, pass_.start_frame, pass_.num_frames)
        numbers = torch.cat((numbers, new), dim=1)
        if numbers.shape[1] > self.num_read:
            places = torch.arange(numbers.shape[1], device=numbers.device)
            order = places + numbers.shape[1] * (counts > 0)
            index = order.topk(self.num_read, dim=1).indices.sort(dim=1).values
            self.buffer.move(layer, index, 0)
            numbers, counts = numbers.gather(1, index), counts.gather(1, index)
            seen = take_tokens(seen, index)
        self._numbers[layer], self._counts[layer], self._seen[layer] = numbers, counts, seen

    def stats(self) -> CacheStats:
        """Places in use; merged ones are used again only when room is needed."""
        num_tokens = self._numbers[-1].shape[1]
        return CacheStats({"memory": num_tokens}, {"memory": num_tokens * self.buffer.bytes_per_token}, self._span)

    def state_dict(self) -> dict[str, Tensor | Number]:
        state: dict[str, Tensor | Number] = {"origin": self._origin}
        for layer, numbers in enumerate(self._numbers):
            state |= {f"{name}.{layer}": getattr(self, f"_{name}")[layer] for name in _OF_TOKENS}
            saved = self.buffer.save(layer, 0, numbers.shape[1])
            state |= {f"stored.{name}.{layer}": tensor for name, tensor in saved.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._origin = int(state["origin"])
        for layer in range(self.geometry.num_layers):
            for name in _OF_TOKENS:
                getattr(self, f"_{name}")[layer] = state[f"{name}.{layer}"].to(self.geometry.device)
            self.buffer.load(layer, 0, saved_part(state, "stored.", f".{layer}"))


def _random_projection(num_channels: int, num_projections: int, like: Tensor) -> Tensor | None:
    """Directions in which near keys stay near: (num_channels, num_projections), the same in every run.

    None where all channels are no more, or ``num_projections`` is 0: then neighbours are found exactly.
    """
    if not 0 < num_projections < num_channels:
        return None
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_channels, num_projections, generator=generator).to(like.device, like.dtype)


def _directions(keys: Tensor, projection: Tensor | None) -> Tensor:
    """Vectors (batch, tokens, channels) of un-rotated keys; the product of two is the mean cosine of their heads."""
    unit = _unit(keys)
    return unit if projection is None else normalize(unit @ projection, dim=-1)


def _merge_repeats(
    old: Stored,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    counts: Tensor,
    cells: Tensor,
    *,
    tokens_per_frame: int,
    min_similarity: float,
) -> tuple[Tensor, Tensor]:
    """Merge whole frames of new tokens, frame by frame, with those before them that they repeat.

    Two tokens correspond if each is the other's nearest by the mean cosine of their heads' keys. The older one is
    counted with the newer one from then on, whose value becomes the mean over all that it stands for (lemma and "last
    key" of TempCache, arXiv:2602.01801). New ``keys``, un-rotated, and ``values`` are (batch, new tokens, heads,
    head_dim); ``seen`` are the ``_directions`` of all tokens, the stored ones first; ``counts``, how many each stored
    token stands for (0: none any more), and ``cells``, its int64 place in the frame, are (batch, stored tokens).
    Returns the values of the new tokens, and the counts of all.
    """
    batch, num_old, values = keys.shape[0], counts.shape[1], values.clone()
    if keys.device.type == "meta":  # played for sizes alone, which merging does not change
        return values, counts.new_empty((batch, num_old + keys.shape[1]))
    old = KeysValues(old.keys, old.values)  # decoded once, where they are encoded
    own = torch.arange(tokens_per_frame, device=keys.device).expand(batch, -1)
    for start in range(0, keys.shape[1], tokens_per_frame):
        new, known = slice(start, start + tokens_per_frame), num_old + start
        weights = torch.zeros_like(own, dtype=counts.dtype)
        if known:
            similarity = seen[:, known : known + tokens_per_frame] @ seen[:, :known].mT
            older, is_mutual = _nearest(similarity, counts, cells)
            theirs = _take(old.keys, keys[:, :start], older)
            cosines = (_unit(keys[:, new]) * _unit(theirs)).sum(dim=-1, dtype=torch.float32)
            weights = counts.gather(1, older) * (is_mutual & (cosines >= min_similarity - _ROUNDING))
            counts = counts.scatter_add(1, older, -weights)
            share = weights[..., None, None]
            mean = (values[:, new].float() + share * _take(old.values, values[:, :start], older).float()) / (1 + share)
            values[:, new] = mean.to(values.dtype)
        counts, cells = torch.cat((counts, 1 + weights), dim=1), torch.cat((cells, own), dim=1)
    return values, counts


def _unit(keys: Tensor) -> Tensor:
    """(batch, tokens, channels): the product of two is the mean cosine of their heads."""
    return normalize(keys, dim=-1).flatten(2) / keys.shape[2] ** 0.5


def _take(old: Tensor, new: Tensor, index: Tensor) -> Tensor:
    """Tokens of both, counted through, without putting all of them into one tensor."""
    num_old = old.shape[1]
    if not num_old or not new.shape[1]:
        return take_tokens(old if num_old else new, index)
    chosen = take_tokens(old, index.clamp(max=num_old - 1))
    return torch.where((index < num_old)[..., None, None], chosen, take_tokens(new, (index - num_old).clamp(min=0)))


def _nearest(similarity: Tensor, counts: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Find every new token's nearest known one, and whether it is the nearest of that one, too: (batch, new tokens).

    ``similarity`` is (batch, new tokens, known tokens) and changed in place, the others are (batch, known tokens).
    """
    similarity = similarity.float().masked_fill_(counts[:, None] == 0, -torch.inf)
    ahead = torch.full_like(similarity[:, :1], _SAME_PLACE)
    similarity.scatter_add_(1, cells[:, None], ahead)
    older = similarity.argmax(dim=2)
    # Only the columns that were chosen matter, few of all.
    newer = similarity.gather(2, older[:, None].expand(-1, similarity.shape[1], -1)).argmax(dim=1)
    return older, newer == torch.arange(similarity.shape[1], device=similarity.device)
