"""Block plans in the forms that kernels take: token masks, groups of equal rows, BSR, flex block masks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from longtake.attention.plan import BlockPlan

Ranges = tuple[tuple[int, int], ...]


class Bsr(NamedTuple):
    """Block compressed sparse rows.

    Attributes:
        indptr: (query blocks + 1,), int32: where each row begins in ``indices``.
        indices: (blocks read,), int32: key blocks, row by row.
        block_rows: Queries of a block.
        block_columns: Keys of a block.
    """

    indptr: Tensor
    indices: Tensor
    block_rows: int
    block_columns: int


@dataclass(frozen=True)
class RowGroup:
    """Queries that read the same keys.

    Attributes:
        heads: Which heads; None: all.
        q_ranges: (start, stop) runs of queries, ascending, neighbours joined.
        k_ranges: (start, stop) runs of keys, likewise.
    """

    heads: tuple[int, ...] | None
    q_ranges: Ranges
    k_ranges: Ranges

    @property
    def num_queries(self) -> int:
        """Queries of each head."""
        return sum(stop - start for start, stop in self.q_ranges)

    @property
    def num_keys(self) -> int:
        """Keys that each of them reads."""
        return sum(stop - start for start, stop in self.k_ranges)


def row_groups(plan: "BlockPlan") -> tuple[RowGroup, ...]:
    """Join the rows of a plan that read the same keys, over blocks and over heads; see ``BlockPlan.group_rows``."""
    masks = plan.block_mask.cpu()
    q_edges, k_edges = (edges.reshape(-1, edges.shape[-1]).tolist() for edges in (plan.q_edges, plan.k_edges))
    num_heads = max(masks.shape[0], len(q_edges), len(k_edges))
    by_keys: dict[tuple[int, Ranges], list[int]] = {}
    for head in range(num_heads):
        mask, own_keys = masks[head % masks.shape[0]], k_edges[head % len(k_edges)]
        seen: dict[bytes, Ranges] = {}
        for row, columns in enumerate(mask.numpy()):
            key = columns.tobytes()
            if key not in seen:
                seen[key] = _joined((own_keys[i], own_keys[i + 1]) for i in columns.nonzero()[0])
            by_keys.setdefault((head, seen[key]), []).append(row)
    by_rows: dict[tuple[Ranges, Ranges], list[int]] = {}
    for (head, k_ranges), rows in by_keys.items():
        edges = q_edges[head % len(q_edges)]
        q_ranges = _joined((edges[row], edges[row + 1]) for row in rows)
        if q_ranges:
            by_rows.setdefault((q_ranges, k_ranges), []).append(head)
    return tuple(
        RowGroup(None if len(heads) == num_heads else tuple(heads), q_ranges, k_ranges)
        for (q_ranges, k_ranges), heads in by_rows.items()
    )


def _joined(ranges: Any) -> Ranges:
    """Runs without the empty ones, neighbours joined."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if stop == start:
            continue
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


def block_of_tokens(edges: Tensor, num_tokens: int) -> Tensor:
    """Which block every token is in.

    Args:
        edges: (blocks + 1,) or (heads, blocks + 1), int32.
        num_tokens: The last edge.

    Returns:
        (1 or heads, tokens), int64.
    """
    edges = edges.reshape(-1, edges.shape[-1])
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=edges.device).expand(edges.shape[0], -1)
    # Right of all edges equal to it, so that blocks without tokens are stepped over.
    return torch.searchsorted(edges[:, 1:].contiguous(), tokens.contiguous(), right=True)


def dense_mask(plan: "BlockPlan", queries: Tensor | None = None) -> Tensor:
    """See ``BlockPlan.to_dense_mask``."""
    rows = _with_order(block_of_tokens(plan.q_edges, plan.num_queries), plan.q_perm)
    rows = rows if queries is None else rows[:, queries]
    columns = _with_order(block_of_tokens(plan.k_edges, plan.num_keys), plan.k_perm)
    heads = torch.arange(plan.num_heads, device=rows.device)
    masks = plan.block_mask
    of_head = [part[heads % part.shape[0]] for part in (rows, columns)]
    mask_of_head = (heads % masks.shape[0])[:, None, None]
    return masks[mask_of_head, of_head[0][:, :, None], of_head[1][:, None, :]]


def _with_order(blocks: Tensor, order: Tensor | None) -> Tensor:
    """The block of every token by its number instead of by its place."""
    if order is None:
        return blocks
    heads = max(blocks.shape[0], order.shape[0])
    blocks, order = blocks.expand(heads, -1), order.expand(heads, -1)
    return torch.empty_like(order).scatter_(1, order, blocks)


def tile_counts(plan: "BlockPlan", block_size: int) -> tuple[Tensor, Tensor]:
    """How much of every tile of a regular grid a plan without an order reads.

    Args:
        plan: The plan.
        block_size: Edge of a tile, tokens.

    Returns:
        Two (1 or heads, query tiles, key tiles) bool tensors: something is read, everything is read.
    """
    rows = _tiles_to_blocks(plan.q_edges, plan.num_queries, block_size)
    columns = _tiles_to_blocks(plan.k_edges, plan.num_keys, block_size)
    # Counts of pairs of blocks, exact in double precision.
    read = rows @ plan.block_mask.double() @ columns.transpose(-1, -2)
    there = rows.sum(-1)[..., :, None] * columns.sum(-1)[..., None, :]
    return read > 0, read == there


def _tiles_to_blocks(edges: Tensor, num_tokens: int, block_size: int) -> Tensor:
    """(1 or heads, tiles, blocks), float64: 1 where a tile and a block share tokens."""
    blocks = block_of_tokens(edges, num_tokens)
    tiles = torch.arange(num_tokens, device=edges.device) // block_size
    shape = (blocks.shape[0], -(-num_tokens // block_size), edges.shape[-1] - 1)
    shared = torch.zeros(shape, dtype=torch.float64, device=edges.device)
    heads = torch.arange(blocks.shape[0], device=edges.device)[:, None].expand_as(blocks)
    shared[heads, tiles.expand_as(blocks), blocks] = 1
    return shared


def flex_block_mask(plan: "BlockPlan", block_size: int) -> Any:
    """See ``BlockPlan.to_flex``; the plan has no order."""
    from torch.nn.attention.flex_attention import BlockMask

    q_blocks = block_of_tokens(plan.q_edges, plan.num_queries)
    k_blocks = block_of_tokens(plan.k_edges, plan.num_keys)
    masks = plan.block_mask

    def reads(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = q_blocks[head if q_blocks.shape[0] > 1 else 0, query]
        column = k_blocks[head if k_blocks.shape[0] > 1 else 0, key]
        return masks[head if masks.shape[0] > 1 else 0, row, column]

    some, every = tile_counts(plan, block_size)
    partial_counts, partial_index = _flex_lists(some & ~every)
    full_counts, full_index = _flex_lists(every)
    return BlockMask.from_kv_blocks(
        partial_counts,
        partial_index,
        full_counts,
        full_index,
        BLOCK_SIZE=block_size,
        mask_mod=reads,
        seq_lengths=(plan.num_queries, plan.num_keys),
    )


def _flex_lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and block numbers of every row, (1, heads, rows) and (1, heads, rows, columns), int32."""
    counts = mask.sum(-1, dtype=torch.int32)
    order = (~mask).to(torch.uint8).argsort(dim=-1, stable=True).to(torch.int32)
    return counts[None].contiguous(), order[None].contiguous()
