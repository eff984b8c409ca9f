"""Calibration of PAROAttention: which order of the three axes makes a head's attention map block-shaped.

Source: PAROAttention, arXiv:2506.16054. The published sum to be minimised has the share of blocks that are nearly
empty with a plus sign, which would choose the order with the fewest; it has a minus here. The weight of the two terms
is not published.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from pathlib import Path

import torch
from torch import Tensor

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
