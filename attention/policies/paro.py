"""PAROAttention: tokens in the order in which a head's map is block-shaped, and its heaviest blocks."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from longtake.attention.geometry import AttentionGeometry, Segment
from longtake.attention.plan import BlockPlan, split_runs
from longtake.attention.policies.base import BlockPolicy, Memory, block_means, is_whole, own_segments, shared_heads

ORDERS = tuple("".join(axes) for axes in permutations("fhw"))
"""The six orders of frames, rows (h) and columns (w), outermost axis first."""


def permutation(order: str, num_frames: int, num_rows: int, num_columns: int) -> Tensor:
    """Which token stands at each place of an order.

    Args:
        order: One of ``ORDERS``; ``fhw`` is the order in which tokens are given.
        num_frames: Frames.
        num_rows: Rows of a frame.
        num_columns: Columns of a frame.

    Returns:
        (tokens,), int64, new place to old.

    Raises:
        ValueError: If the order is unknown.
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is unknown; known: {', '.join(ORDERS)}.")
    tokens = torch.arange(num_frames * num_rows * num_columns).view(num_frames, num_rows, num_columns)
    return tokens.permute(["fhw".index(axis) for axis in order]).flatten()


def calibrate(
    attention_map: Tensor,
    num_frames: int,
    num_rows: int,
    num_columns: int,
    *,
    block_size: int = 64,
    empty_share: float = 0.9,
    threshold: float = 1e-3,
    alpha: float = 0.5,
) -> str:
    """Choose an order for a head.

    Args:
        attention_map: (tokens, tokens), softmax weights of the head over a whole video, averaged over prompts.
        num_frames: Frames.
        num_rows: Rows of a frame.
        num_columns: Columns of a frame.
        block_size: Tokens on each side of a block; incomplete blocks at the end do not count.
        empty_share: A block is nearly empty if this share of its weights is below ``threshold``.
        threshold: See ``empty_share``.
        alpha: Weight of emptiness; the rest goes to evenness inside blocks, which quantised kernels want.

    Returns:
        The order of ``ORDERS`` with the lowest cost.

    Raises:
        ValueError: If the map is not square with as many tokens, or smaller than a block.
    """
    num_tokens = num_frames * num_rows * num_columns
    if tuple(attention_map.shape) != (num_tokens, num_tokens) or num_tokens < block_size:
        raise ValueError(
            f"attention_map is {tuple(attention_map.shape)} but must be {(num_tokens, num_tokens)}, "
            f"and at least one block of block_size={block_size}."
        )
    empty, uneven = [], []
    for order in ORDERS:
        tokens = permutation(order, num_frames, num_rows, num_columns).to(attention_map.device)
        blocks = _blocks(attention_map[tokens][:, tokens].float(), block_size)
        is_empty = (blocks < threshold).float().mean(-1) >= empty_share
        empty.append(is_empty.float().mean())
        uneven.append((blocks.amax(-1) / blocks.mean(-1).clamp(min=1e-12)).mean())
    occupied = 1 - torch.stack(empty)
    cost = alpha * _share(occupied) + (1 - alpha) * _share(torch.stack(uneven))
    return ORDERS[int(cost.argmin())]


def mask_from_sums(sums: Tensor, density: float) -> Tensor:
    """Keep the blocks with the largest sums of weights, and of every row the largest.

    Args:
        sums: (..., rows, columns) sums of attention weights.
        density: Share of the blocks to keep, above 0 to 1.

    Returns:
        Same shape, bool; at least the share, rounded, and more if rows would be empty.
    """
    flat = sums.flatten(-2)
    count = max(1, round(density * flat.shape[-1]))
    order = flat.argsort(dim=-1, descending=True, stable=True)[..., :count]
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, order, True).view_as(sums)
    return mask.scatter(-1, sums.argmax(-1, keepdim=True), True)


def mask_from_map(attention_map: Tensor, density: float, *, block_size: int = 64) -> Tensor:
    """Keep the blocks of an attention map with the largest sums.

    Args:
        attention_map: (tokens, tokens) in the head's order; ``permutation`` gives it.
        density: Share of the blocks to keep.
        block_size: Tokens on each side of a block; the last may be shorter.

    Returns:
        (blocks, blocks), bool.
    """
    block = torch.arange(len(attention_map), device=attention_map.device) // block_size
    count = int(block[-1]) + 1
    rows = attention_map.new_zeros(count, len(attention_map)).index_add_(0, block, attention_map)
    return mask_from_sums(attention_map.new_zeros(count, count).index_add_(1, block, rows), density)


def _blocks(attention_map: Tensor, size: int) -> Tensor:
    """(blocks, tokens of a block)."""
    count = len(attention_map) // size
    whole = attention_map[: count * size, : count * size]
    return whole.view(count, size, count, size).transpose(1, 2).reshape(count * count, size * size)


def _share(values: Tensor) -> Tensor:
    return values / values.sum().clamp(min=1e-12)


@dataclass(frozen=True, eq=False)
class Calibration:
    """What was measured for a model.

    Attributes:
        orders: (layers, heads), int64, into ``ORDERS``.
        masks: (sets, layers, heads, blocks, blocks), bool, over a whole video in the heads' orders, one set for each
            of the first steps, the last for all steps after them; None: blocks are chosen when they are needed.
    """

    orders: Tensor
    masks: Tensor | None = None

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        from safetensors.torch import save_file

        parts: Mapping[str, Tensor] = {"orders": self.orders}
        save_file(parts if self.masks is None else {**parts, "masks": self.masks}, str(path))


@lru_cache(maxsize=4)
def load_calibration(path: str) -> Calibration:
    """Read what ``Calibration.save`` wrote.

    Raises:
        ValueError: If the file cannot be read, or holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        parts = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the calibration {path}: {error}") from error
    orders, masks = parts.get("orders"), parts.get("masks")
    if orders is None or orders.ndim != 2 or not 0 <= int(orders.min()) <= int(orders.max()) < len(ORDERS):
        raise ValueError(f"{path} holds no calibration: it needs orders, (layers, heads) with numbers from 0 to 5.")
    if masks is not None and (masks.ndim != 5 or masks.shape[1:3] != orders.shape or masks.dtype != torch.bool):
        raise ValueError(
            f"{path} holds masks {tuple(masks.shape)} of {masks.dtype}: "
            f"they must be bool, (sets, {orders.shape[0]}, {orders.shape[1]}, blocks, blocks)."
        )
    return Calibration(orders, masks)


@dataclass(frozen=True, kw_only=True)
class Paro(BlockPolicy):
    """One of six axis orders per head, and blocks by their weight, measured once or estimated in every call.

    Measured masks are of a whole video. Without them, weights are those of mean queries and mean keys. In the cached
    form only the frames that ask may be interleaved; frames that are cached are turned in themselves.
    """

    name: ClassVar[str] = "paro"
    source: ClassVar[str] = "PAROAttention, arXiv:2506.16054"

    order: str = "fhw"  # outermost axis first, f frames, h rows, w columns: for all heads that are not calibrated
    density: float = 0.5  # share of the blocks that is read, where masks are not calibrated; 0.2 to 0.5 are published
    block_size: int = 64  # tokens on each side of a block
    calibration: str | None = None  # safetensors file with an order, and maybe masks, for every layer and head

    def __post_init__(self) -> None:
        super().__post_init__()
        permutation(self.order, 1, 1, 1)
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density} must be above 0 and at most 1.")
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be 1 or more.")
        if self.calibration is not None:
            load_calibration(self.calibration)

    @property
    def is_static(self) -> bool:
        """False: where masks are not measured, blocks are chosen by the tokens."""
        return False

    def make_plan(
        self,
        q: Tensor | None,
        k: Tensor | None,
        geometry: AttentionGeometry,
        *,
        v: Tensor | None = None,
        memory: Memory | None = None,
    ) -> BlockPlan | None:
        """Order the tokens of every head, and choose blocks."""
        own_segments(geometry)
        calibration = None if self.calibration is None else load_calibration(self.calibration)
        orders = self._orders(geometry, q.shape[2], calibration)
        q_perm = torch.stack([_query_order(order, geometry) for order in orders])
        k_perm = torch.stack([_key_order(order, geometry) for order in orders])
        q_edges, k_edges = split_runs([geometry.num_queries], self.block_size), self._key_edges(geometry)
        mask = None if calibration is None else self._measured(geometry, q.shape[2], calibration)
        if mask is None:
            heads = torch.arange(q.shape[2]).to(q.device)
            queries = block_means(q[0][q_perm.T.to(q.device), heads], q_edges)
            keys = block_means(shared_heads(k[0], q.shape[2])[k_perm.T.to(q.device), heads], k_edges)
            scores = torch.einsum("qhd,khd->hqk", queries, keys) / q.shape[3] ** 0.5
            sizes = k_edges.diff().to(scores)
            mask = mask_from_sums((scores + sizes.log()).softmax(-1), self.density).cpu()
        return BlockPlan.from_dense_block_mask(mask, q_edges, k_edges, q_perm=q_perm, k_perm=k_perm).validate()

    def _orders(self, geometry: AttentionGeometry, num_heads: int, calibration: Calibration | None) -> list[str]:
        if calibration is None:
            return [self.order] * num_heads
        num_layers, known_heads = calibration.orders.shape
        if geometry.layer >= num_layers or known_heads != num_heads:
            raise ValueError(
                f"calibration={self.calibration!r} is of {num_layers} layers with {known_heads} heads "
                f"and has nothing for layer {geometry.layer} with {num_heads}: calibrate for this model."
            )
        return [ORDERS[number] for number in calibration.orders[geometry.layer].tolist()]

    def _measured(self, geometry: AttentionGeometry, num_heads: int, calibration: Calibration) -> Tensor | None:
        if calibration.masks is None:
            return None
        count = -(-geometry.num_queries // self.block_size)
        if geometry.num_queries != geometry.num_keys or calibration.masks.shape[-1] != count:
            raise ValueError(
                f"calibration={self.calibration!r} has masks of {calibration.masks.shape[-1]} blocks, but there are "
                f"{geometry.num_queries} queries and {geometry.num_keys} keys in blocks of {self.block_size}: "
                "measured masks are for one length of whole videos; calibrate without masks for others."
            )
        return calibration.masks[min(geometry.step_index, len(calibration.masks) - 1), geometry.layer]

    def _key_edges(self, geometry: AttentionGeometry) -> Tensor:
        before, after = _others(geometry)
        lengths = [segment.length for segment in before], [segment.length for segment in after]
        return split_runs([*lengths[0], geometry.num_queries, *lengths[1]], self.block_size)


def _others(geometry: AttentionGeometry) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """What lies before and behind the frames that ask."""
    own = own_segments(geometry)
    return geometry.segments[: own[0]], geometry.segments[own[-1] + 1 :]


def _query_order(order: str, geometry: AttentionGeometry) -> Tensor:
    return permutation(order, len(geometry.query_frames), *geometry.grid)


def _key_order(order: str, geometry: AttentionGeometry) -> Tensor:
    """Cached frames in the order's rows and columns, and the frames that ask as the queries."""
    before, after = _others(geometry)
    within = permutation("f" + order.replace("f", ""), 1, *geometry.grid)

    def tokens(segment: Segment) -> Tensor:
        return segment.start + (within if is_whole(segment, geometry) else torch.arange(segment.length))

    start = before[-1].stop if before else 0
    return torch.cat([*map(tokens, before), start + _query_order(order, geometry), *map(tokens, after)])
