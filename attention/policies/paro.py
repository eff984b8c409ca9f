"""PAROAttention: tokens in the order in which a head's map is block-shaped, and its heaviest blocks."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longtake.attention.geometry import AttentionGeometry, Segment
from longtake.attention.paro_calibration import ORDERS, Calibration, load_calibration, mask_from_sums, permutation
from longtake.attention.plan import BlockPlan, split_runs
from longtake.attention.policies.base import BlockPolicy, Memory, is_whole, own_segments, shared_heads
from longtake.attention.pooling import block_means


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
