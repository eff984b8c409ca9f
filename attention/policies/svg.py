"""Sparse VideoGen: a head looks around in its frame, or along time at its place; each gets the band that suits it."""

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from longtake.attention.geometry import AttentionGeometry
from longtake.attention.plan import BlockPlan, uniform_edges
from longtake.attention.policies.base import Memory, TokenPolicy, Tokens, shared_heads

_BAND_STEP = 128  # tokens: the source rounds the half width of its band up to a multiple of it


@dataclass(frozen=True, kw_only=True)
class Svg(TokenPolicy):
    """Per head the cheaper of two layouts by a sample of queries, then a band and the first keys of that order.

    In the cached form a query's own place among all keys is the middle of its band.
    """

    name: ClassVar[str] = "svg"
    source: ClassVar[str] = "Sparse VideoGen, arXiv:2502.01776"
    needs_values: ClassVar[bool] = True
    needs_frames: ClassVar[bool] = True

    density: float = 0.3  # share of the pairs in the band; what the source's scripts call sparsity
    num_sampled_rows: int = 64  # queries that decide on the layout of every head
    num_sampled_from: int = 10000  # they are drawn from the first so many
    block_size: int = 128  # tokens on each side of a block
    temporal_sink: bool = True  # the first places of the temporal order, as many as a frame has, are read by all
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_share("density")
        self._check_least(1, "num_sampled_rows", "num_sampled_from", "block_size")

    def token_plan(self, tokens: Tokens, geometry: AttentionGeometry, memory: Memory) -> BlockPlan:
        geometry.own_segments()
        if not all(map(geometry.is_whole, geometry.segments)):
            raise ValueError(
                "attention policy 'svg' needs whole frames among the keys: "
                "compressed memory and text have no place in its orders."
            )
        both = _layouts(len(geometry.query_frames), len(geometry.segments), geometry.frame_tokens)
        kind = self._temporal_heads(tokens, geometry, both).cpu().long()
        bands = [self._band(both[0], geometry, True), self._band(both[1], geometry, self.temporal_sink)]
        return BlockPlan.from_dense_block_mask(
            torch.stack(bands)[kind],
            uniform_edges(geometry.num_queries, self.block_size),
            uniform_edges(geometry.num_keys, self.block_size),
            q_perm=torch.stack([layout.q_perm for layout in both])[kind],
            k_perm=torch.stack([layout.k_perm for layout in both])[kind],
        )

    def _temporal_heads(self, tokens: Tokens, geometry: AttentionGeometry, both: "tuple[_Layout, _Layout]") -> Tensor:
        """Tell which heads the temporal mask changes less than the spatial one, by a sample of queries.

        The masks that decide are the source's: blocks of 128 nearer than two frames, and the first frame's worth of
        keys in the layout's order.
        """
        q, generator = tokens.q, torch.Generator().manual_seed(self.seed)
        rows = torch.randint(min(len(q), self.num_sampled_from), (self.num_sampled_rows,), generator=generator)
        k, v = (shared_heads(x, q.shape[1]).float() for x in (tokens.k, tokens.v))
        scores = torch.einsum("rhd,khd->hrk", q[rows.to(q.device)].float(), k) / q.shape[-1] ** 0.5
        exact = torch.einsum("hrk,khd->hrd", scores.softmax(-1), v)
        errors = []
        for layout in both:
            mask = _sample_mask(layout, rows, geometry).to(q.device)
            masked = scores.masked_fill(~mask, float("-inf")).softmax(-1)
            errors.append((torch.einsum("hrk,khd->hrd", masked, v) - exact).square().mean((1, 2)))
        return errors[1] < errors[0]

    def _band(self, layout: "_Layout", geometry: AttentionGeometry, has_sink: bool) -> Tensor:
        """(query blocks, key blocks), bool: blocks no farther from each other than the band is wide."""
        num_keys, size = geometry.num_keys, self.block_size
        width = math.ceil(_half_width(layout.own, num_keys, self.density) / _BAND_STEP) * _BAND_STEP
        blocks = layout.own.split(size)
        first = torch.stack([block.min() for block in blocks])[:, None]
        last = torch.stack([block.max() for block in blocks])[:, None]
        starts = torch.arange(0, num_keys, size)
        stops = (starts + size).clamp(max=num_keys)
        # Of two blocks of a square this is their distance in blocks times the size.
        gap = torch.maximum(starts - last, first - (stops - 1)) - 1 + size
        is_read = gap <= width
        return is_read | (starts < geometry.frame_tokens) if has_sink else is_read


class _Layout(NamedTuple):
    q_perm: Tensor  # (queries,), int64: the query at each place
    k_perm: Tensor  # (keys,), int64: the key at each place
    own: Tensor  # (queries,), int64: for each query place the place of the query's own key


def _layouts(num_query_frames: int, num_key_frames: int, tokens_per_frame: int) -> tuple[_Layout, _Layout]:
    """The spatial order, frame by frame, and the temporal one, place by place; the last frames ask."""
    queries, keys = (torch.arange(frames * tokens_per_frame) for frames in (num_query_frames, num_key_frames))
    q_turned = queries.view(num_query_frames, tokens_per_frame).T.reshape(-1)
    k_turned = keys.view(num_key_frames, tokens_per_frame).T.reshape(-1)
    own = queries + (num_key_frames - num_query_frames) * tokens_per_frame
    return _Layout(queries, keys, own), _Layout(q_turned, k_turned, k_turned.argsort()[own[q_turned]])


def _half_width(own: Tensor, num_keys: int, density: float) -> int:
    """Least half width of a band around each query's own place that covers a share of all pairs.

    For a square of S tokens it is S (1 - sqrt(1 - density)), as the source has it.
    """

    def num_covered(width: int) -> int:
        return int(((own + width).clamp(max=num_keys - 1) - (own - width).clamp(min=0) + 1).sum())

    return bisect_left(range(num_keys), density * num_keys * len(own), key=num_covered)


def _sample_mask(layout: _Layout, rows: Tensor, geometry: AttentionGeometry) -> Tensor:
    """(rows, keys) in the order of the tokens, bool."""
    places, own = layout.k_perm.argsort(), layout.own[layout.q_perm.argsort()]
    reach = max(1, 2 * geometry.frame_tokens // _BAND_STEP)
    apart = (own[rows][:, None] // _BAND_STEP - places // _BAND_STEP).abs()
    return (apart < reach) | (places < geometry.frame_tokens)
