"""PAROAttention: tokens in the order in which a head's map is block-shaped, and its heaviest blocks.

The published sum that calibration minimises has the share of blocks that are nearly empty with a plus sign, which
would choose the order with the fewest; it has a minus here. The weight of the two terms is not published.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from longtake.attention.geometry import AttentionGeometry, Segment
from longtake.attention.plan import BlockPlan, split_runs, uniform_edges
from longtake.attention.policies.base import Memory, TokenPolicy, Tokens, block_means, shared_heads

ORDERS = tuple("".join(axes) for axes in permutations("fhw"))
"""The six orders of frames, rows (h) and columns (w), outermost axis first."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Orders and masks that were measured for a model.

    Masks are over a whole video in the heads' orders, one set for each of the first steps, the last for all steps
    after them; without them blocks are chosen when they are needed.
    """

    orders: Tensor  # (layers, heads), int64, into ``ORDERS``
    masks: Tensor | None = None  # (sets, layers, heads, blocks, blocks), bool

    def save(self, path: str | Path) -> None:
        save_file({"orders": self.orders} | ({} if self.masks is None else {"masks": self.masks}), path)

    @classmethod
    def load(cls, path: str) -> "Calibration":
        """Read a safetensors file, or say with ``ValueError`` what is wrong with it."""
        try:
            parts = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read the calibration {path}: {error}") from error
        orders, masks = parts.get("orders"), parts.get("masks")
        if orders is None or orders.ndim != 2 or not 0 <= int(orders.min()) <= int(orders.max()) < len(ORDERS):
            raise ValueError(
                f"{path} holds no calibration: it needs orders, (layers, heads) with numbers from 0 to 5."
            )
        if masks is not None and (masks.ndim != 5 or masks.shape[1:3] != orders.shape or masks.dtype != torch.bool):
            raise ValueError(
                f"{path} holds masks {tuple(masks.shape)} of {masks.dtype}: "
                f"they must be bool, (sets, {orders.shape[0]}, {orders.shape[1]}, blocks, blocks)."
            )
        return cls(orders, masks)


_load_calibration = lru_cache(maxsize=4)(Calibration.load)


@dataclass(frozen=True, kw_only=True)
class Paro(TokenPolicy):
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
        self._check_share("density")
        self._check_least(1, "block_size")
        if self.calibration is not None:
            _load_calibration(self.calibration)

    def token_plan(self, tokens: Tokens, geometry: AttentionGeometry, memory: Memory) -> BlockPlan:
        q, own = tokens.q, geometry.own_segments()
        before, after = geometry.segments[: own[0]], geometry.segments[own[-1] + 1 :]
        calibration = None if self.calibration is None else _load_calibration(self.calibration)
        start, q_perms, k_perms = geometry.segments[own[0]].start, [], []
        for order in self._orders(geometry, q.shape[1], calibration):
            asking = permutation(order, len(geometry.query_frames), *geometry.grid)
            q_perms.append(asking)
            cached = (_in_order(segments, order, geometry) for segments in (before, after))
            k_perms.append(torch.cat([*next(cached), start + asking, *next(cached)]))
        q_perm, k_perm = torch.stack(q_perms), torch.stack(k_perms)
        lengths = geometry.key_lengths
        lengths[own[0] : own[-1] + 1] = [geometry.num_queries]
        q_edges, k_edges = uniform_edges(geometry.num_queries, self.block_size), split_runs(lengths, self.block_size)
        mask = None if calibration is None else self._measured(geometry, calibration)
        if mask is None:
            heads = torch.arange(q.shape[1]).to(q.device)
            queries = block_means(q[q_perm.T.to(q.device), heads], q_edges)
            keys = block_means(shared_heads(tokens.k, q.shape[1])[k_perm.T.to(q.device), heads], k_edges)
            scores = torch.einsum("qhd,khd->hqk", queries, keys) / q.shape[2] ** 0.5
            sizes = k_edges.diff().to(scores)
            mask = _mask_from_sums((scores + sizes.log()).softmax(-1), self.density).cpu()
        return BlockPlan.from_dense_block_mask(mask, q_edges, k_edges, q_perm=q_perm, k_perm=k_perm)

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

    def _measured(self, geometry: AttentionGeometry, calibration: Calibration) -> Tensor | None:
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


def _in_order(segments: tuple[Segment, ...], order: str, geometry: AttentionGeometry) -> list[Tensor]:
    """Tokens of cached segments, frames in the order's rows and columns."""
    within = permutation("f" + order.replace("f", ""), 1, *geometry.grid)
    return [s.start + (within if geometry.is_whole(s) else torch.arange(s.length)) for s in segments]


def permutation(order: str, num_frames: int, num_rows: int, num_columns: int) -> Tensor:
    """(tokens,), int64: the token at each place once a video is sorted by an order of ``ORDERS``.

    Tokens are given in the order ``fhw``.
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is unknown; known: {', '.join(ORDERS)}.")
    tokens = torch.arange(num_frames * num_rows * num_columns).view(num_frames, num_rows, num_columns)
    return tokens.permute(["fhw".index(axis) for axis in order]).flatten()


def calibrate(
    attention_map: Tensor,
    shape: tuple[int, int, int],
    *,
    block_size: int = 64,
    empty_share: float = 0.9,
    threshold: float = 1e-3,
    alpha: float = 0.5,
) -> str:
    """Choose the order of ``ORDERS`` with the lowest cost for a head.

    Args:
        attention_map: (tokens, tokens), softmax weights of the head over a whole video, averaged over prompts.
        shape: Frames, rows and columns of the video.
        block_size: Tokens on each side of a block; incomplete blocks at the end do not count.
        empty_share: A block is nearly empty if this share of its weights is below ``threshold``.
        threshold: See ``empty_share``.
        alpha: Weight of emptiness; the rest goes to evenness inside blocks, which quantised kernels want.
    """
    num_tokens = shape[0] * shape[1] * shape[2]
    if tuple(attention_map.shape) != (num_tokens, num_tokens) or num_tokens < block_size:
        raise ValueError(
            f"attention_map is {tuple(attention_map.shape)} but must be {(num_tokens, num_tokens)}, "
            f"and at least one block of block_size={block_size}."
        )
    empty, uneven = [], []
    count = num_tokens // block_size
    for order in ORDERS:
        tokens = permutation(order, *shape).to(attention_map.device)[: count * block_size]
        blocks = attention_map[tokens][:, tokens].float().view(count, block_size, count, block_size)
        blocks = blocks.transpose(1, 2).reshape(count * count, -1)
        is_empty = (blocks < threshold).float().mean(-1) >= empty_share
        empty.append(is_empty.float().mean())
        uneven.append((blocks.amax(-1) / blocks.mean(-1).clamp(min=1e-12)).mean())
    occupied, uneven = 1 - torch.stack(empty), torch.stack(uneven)
    occupied, uneven = (values / values.sum().clamp(min=1e-12) for values in (occupied, uneven))
    return ORDERS[int((alpha * occupied + (1 - alpha) * uneven).argmin())]


def _mask_from_sums(sums: Tensor, density: float) -> Tensor:
    """Keep the blocks with the largest (..., rows, columns) sums of weights, and of every row the largest.

    At least the share of blocks that ``density`` says is kept, rounded, and more if rows would be empty.
    """
    flat = sums.flatten(-2)
    count = max(1, round(density * flat.shape[-1]))
    order = flat.argsort(dim=-1, descending=True, stable=True)[..., :count]
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, order, True).view_as(sums)
    return mask.scatter(-1, sums.argmax(-1, keepdim=True), True)


def mask_from_map(attention_map: Tensor, density: float, *, block_size: int = 64) -> Tensor:
    """Keep the (blocks, blocks) of a (tokens, tokens) attention map in the head's order with the largest sums."""
    block = torch.arange(len(attention_map), device=attention_map.device) // block_size
    count = int(block[-1]) + 1
    rows = attention_map.new_zeros(count, len(attention_map)).index_add_(0, block, attention_map)
    return _mask_from_sums(attention_map.new_zeros(count, count).index_add_(1, block, rows), density)
