"""Block plans: the keys that every query reads, as blocks of tokens. Policies make them and backends run them.

A plan knows neither the policy that made it nor the kernel that will run it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class RowGroup:
    """Queries that read the same keys."""

    heads: tuple[int, ...] | None  # None: all
    q_ranges: Ranges  # (start, stop) runs of queries, ascending, neighbours joined
    k_ranges: Ranges

    @property
    def num_queries(self) -> int:
        return sum(stop - start for start, stop in self.q_ranges)

    @property
    def num_keys(self) -> int:
        """Keys that each of them reads."""
        return sum(stop - start for start, stop in self.k_ranges)


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockPlan:
    """Blocks of keys that every block of queries reads, the same for all samples of a batch.

    Heads may share one map (``counts.shape[0] == 1``) or have one each. Edges may be shared, or differ by head, as
    clusters do; blocks may then be empty. Where the two disagree on the number of heads, the one is repeated.
    """

    # Ascending from 0 to the number of tokens: (blocks + 1,) or (heads, blocks + 1), int32
    q_edges: Tensor
    k_edges: Tensor
    counts: Tensor  # (1 or heads, query blocks), int32: key blocks that each block of queries reads
    index: Tensor  # (1 or heads, query blocks, most), int32: their numbers, ascending, filled up with -1
    # (1 or heads, tokens), int64: the token at each place before blocks are cut; None: in order
    q_perm: Tensor | None = None
    k_perm: Tensor | None = None  # of keys and values

    def __post_init__(self) -> None:
        for name in ("q_edges", "k_edges"):
            edges = getattr(self, name)
            if edges.dtype != torch.int32 or edges.ndim not in (1, 2) or edges.shape[-1] < 2:
                raise ValueError(f"{name} is {_shape(edges)}: give int32 (blocks + 1,) or (heads, blocks + 1).")
        expected = (self.counts.shape[0], self.q_edges.shape[-1] - 1)
        if self.counts.dtype != torch.int32 or tuple(self.counts.shape) != expected:
            raise ValueError(f"counts is {_shape(self.counts)}: give int32 (1 or heads, {expected[1]}).")
        if self.index.dtype != torch.int32 or self.index.ndim != 3 or tuple(self.index.shape[:2]) != expected:
            raise ValueError(f"index is {_shape(self.index)}: give int32 {(*expected, 'most')}.")
        for name in ("q_perm", "k_perm"):
            order = getattr(self, name)
            if order is not None and (order.dtype != torch.int64 or order.ndim != 2):
                raise ValueError(f"{name} is {_shape(order)}: give int64 (1 or heads, tokens).")
        if len(set(self._all_heads()) - {1}) > 1:
            raise ValueError(
                f"the parts of a plan speak of {self._all_heads()} heads: let each be 1 or the same number."
            )

    @classmethod
    def from_dense_block_mask(
        cls,
        mask: Tensor,
        q_edges: Tensor,
        k_edges: Tensor,
        *,
        q_perm: Tensor | None = None,
        k_perm: Tensor | None = None,
    ) -> "BlockPlan":
        """Make a plan of a map of blocks; the other arguments are the attributes.

        Args:
            mask: (query blocks, key blocks), or (1 or heads, query blocks, key blocks), bool: True is read.
        """
        mask = mask[None] if mask.ndim == 2 else mask
        expected = (q_edges.shape[-1] - 1, k_edges.shape[-1] - 1)
        if mask.dtype != torch.bool or mask.ndim != 3 or tuple(mask.shape[1:]) != expected:
            raise ValueError(f"mask is {_shape(mask)}: give bool (1 or heads, {expected[0]}, {expected[1]}).")
        counts, order = block_lists(mask)
        most = max(int(counts.max()), 1)
        order = order[..., :most]
        is_filling = torch.arange(most, device=mask.device) >= counts[..., None]
        index = order.masked_fill(is_filling, -1)
        return cls(q_edges=q_edges, k_edges=k_edges, counts=counts, index=index, q_perm=q_perm, k_perm=k_perm)

    def _all_heads(self) -> tuple[int, ...]:
        edges = [edges.shape[0] for edges in (self.q_edges, self.k_edges) if edges.ndim == 2]
        orders = [order.shape[0] for order in (self.q_perm, self.k_perm) if order is not None]
        return (self.counts.shape[0], *edges, *orders)

    @property
    def num_heads(self) -> int:
        """Heads the plan tells apart: 1 if all share one map, edges and order."""
        return max(self._all_heads())

    @cached_property
    def num_queries(self) -> int:
        return int(self.q_edges.reshape(-1)[-1])

    @cached_property
    def num_keys(self) -> int:
        return int(self.k_edges.reshape(-1)[-1])

    @cached_property
    def block_mask(self) -> Tensor:
        """(1 or heads, query blocks, key blocks), bool: the map itself."""
        heads, blocks, _ = self.index.shape
        num_columns = self.k_edges.shape[-1] - 1
        # The filling points to one more column, which is cut off.
        columns = torch.where(self.index < 0, num_columns, self.index).long()
        mask = torch.zeros(heads, blocks, num_columns + 1, dtype=torch.bool, device=self.index.device)
        return mask.scatter_(-1, columns, True)[..., :-1]

    @cached_property
    def keys_per_row(self) -> Tensor:
        """(1 or heads, query blocks), int64: key tokens that each block of queries reads."""
        sizes = _sizes(self.k_edges).double()
        return (self.block_mask.double() @ sizes[..., None])[..., 0].long()

    @cached_property
    def density(self) -> float:
        """Share of the (query, key) pairs that is computed, 0 to 1; the mean over heads."""
        rows = _sizes(self.q_edges) * self.keys_per_row
        return float(rows.sum()) / (rows.shape[0] * self.num_queries * self.num_keys)

    def validate(self) -> "BlockPlan":
        """Check the contents, once per plan, and return it.

        Raises:
            ValueError: If edges do not ascend, an index is out of order or of range, a count does not fit, an order is
                no permutation, or a query reads no key: kernels give different results there, 0 or not-a-number.
        """
        return self._validated

    @cached_property
    def _validated(self) -> "BlockPlan":
        for name, edges in (("q_edges", self.q_edges), ("k_edges", self.k_edges)):
            starts, ends = edges[..., 0], edges[..., -1]
            if bool(starts.any() | (edges.diff(dim=-1) < 0).any() | (ends != ends.reshape(-1)[0]).any()):
                raise ValueError(f"{name} must ascend from 0 to the number of tokens, the same for all heads.")
        most, num_columns = self.index.shape[-1], self.k_edges.shape[-1] - 1
        is_filling = torch.arange(most, device=self.index.device) >= self.counts[..., None]
        if bool((self.counts > most).any() | (self.counts < 0).any() | ((self.index < 0) != is_filling).any()):
            raise ValueError("index must hold counts blocks in every row, and be filled up with -1 behind them.")
        is_descending = (self.index.diff(dim=-1) <= 0) & ~is_filling[..., 1:]
        if bool((self.index >= num_columns).any() | is_descending.any()):
            raise ValueError(f"the blocks in a row of index must ascend and be below {num_columns}, the key blocks.")
        for name, order, length in (("q_perm", self.q_perm, self.num_queries), ("k_perm", self.k_perm, self.num_keys)):
            if order is None:
                continue
            places = torch.arange(length, device=order.device)
            if order.shape[-1] != length or bool((order.sort(dim=-1).values != places).any()):
                raise ValueError(f"{name} must hold every number from 0 to {length - 1} once per head.")
        is_empty = (self.keys_per_row == 0) & (_sizes(self.q_edges) > 0)
        if bool(is_empty.any()):
            head, row = is_empty.nonzero()[0].tolist()
            raise ValueError(
                f"query block {row} of head {head} reads no key (of {int(is_empty.sum())} such): "
                "let every query read at least one block, its own for instance."
            )
        return self

    def without_order(self) -> "BlockPlan":
        """The same blocks over tokens that stand in the plan's order already."""
        return self if self.q_perm is None and self.k_perm is None else replace(self, q_perm=None, k_perm=None)

    def to(self, device: Any) -> "BlockPlan":
        parts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return replace(self, **{name: part.to(device) for name, part in parts.items() if part is not None})

    def to_dense_mask(self, queries: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        """The plan token by token, in the order given to attention: (1 or heads, queries, keys), bool, True is read.

        ``queries`` and ``keys``, (some,), int64, leave only these of them.
        """
        rows = _with_order(block_of_tokens(self.q_edges, self.num_queries), self.q_perm)
        columns = _with_order(block_of_tokens(self.k_edges, self.num_keys), self.k_perm)
        rows, columns = (x if some is None else x[:, some] for x, some in ((rows, queries), (columns, keys)))
        heads = torch.arange(self.num_heads, device=rows.device)
        rows, columns = (part[heads % part.shape[0]] for part in (rows, columns))
        map_of_head = (heads % self.block_mask.shape[0])[:, None, None]
        return self.block_mask[map_of_head, rows[:, :, None], columns[:, None, :]]

    @cached_property
    def kept(self) -> dict[Any, Any]:
        """Masks that backends have made of the plan, kept as long as it lives."""
        return {}

    @cached_property
    def row_groups(self) -> tuple[RowGroup, ...]:
        """Queries that read the same keys, so that each group is one dense attention."""
        masks = self.block_mask.cpu()
        q_edges, k_edges = (edges.reshape(-1, edges.shape[-1]).tolist() for edges in (self.q_edges, self.k_edges))
        num_heads = max(masks.shape[0], len(q_edges), len(k_edges))
        by_keys: dict[tuple[int, Ranges], list[int]] = {}
        for head in range(num_heads):
            own_keys = k_edges[head % len(k_edges)]
            seen: dict[bytes, Ranges] = {}
            for row, columns in enumerate(masks[head % masks.shape[0]].numpy()):
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

    @cached_property
    def tile(self) -> float:
        """Queries computed together, on average: those of a group, or of a block where heads differ."""
        if self.num_heads > 1 or self.counts.device.type != "cpu":
            return self.num_queries / self.counts.shape[1]
        return sum(group.num_queries for group in self.row_groups) / len(self.row_groups)

    @cached_property
    def uniform_block_sizes(self) -> tuple[int | None, int | None]:
        """Size of all query blocks and of all key blocks, but the last ones, which may be shorter; None: they vary."""
        return _uniform_size(self.q_edges), _uniform_size(self.k_edges)


def block_lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Count the blocks read in every row of a map, and list their numbers, ascending, before the others; int32."""
    # A stable sort that puts the blocks read first keeps them ascending.
    order = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)
    return mask.sum(-1, dtype=torch.int32), order.to(torch.int32)


def uniform_edges(length: int, block_size: int) -> Tensor:
    """Edges of blocks of one size over ``length`` tokens; the last block may be shorter."""
    return split_runs([length], block_size)


def split_runs(lengths: Iterable[int], block_size: int) -> Tensor:
    """Edges of blocks that never straddle two runs, such as frames: 1,560 tokens by 128 are 12 blocks and one of 24.

    The last block of a run may be shorter. The result is (blocks + 1,), int32, from 0 to the sum of ``lengths``.
    """
    lengths = list(lengths)
    if block_size < 1 or not lengths or min(lengths) < 1:
        raise ValueError(f"block_size={block_size} and lengths={lengths} must all be 1 or more, at least one length.")
    edges, start = [0], 0
    for length in lengths:
        edges.extend(range(start + block_size, start + length, block_size))
        start += length
        edges.append(start)
    return torch.tensor(edges, dtype=torch.int32)


def edges_of(sizes: Tensor) -> Tensor:
    """Edges, int32, of (..., blocks) sizes."""
    return torch.nn.functional.pad(sizes.cumsum(-1), (1, 0)).to(torch.int32)


def _joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
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
    """(1 or heads, tokens), int64: the block of every token, by the edges."""
    edges = edges.reshape(-1, edges.shape[-1])
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=edges.device).expand(edges.shape[0], -1)
    # Right of all edges equal to it, so that blocks without tokens are stepped over.
    return torch.searchsorted(edges[:, 1:].contiguous(), tokens.contiguous(), right=True)


def _with_order(blocks: Tensor, order: Tensor | None) -> Tensor:
    """The block of every token by its number instead of by its place."""
    if order is None:
        return blocks
    heads = max(blocks.shape[0], order.shape[0])
    blocks, order = blocks.expand(heads, -1), order.expand(heads, -1)
    return torch.empty_like(order).scatter_(1, order, blocks)


def _sizes(edges: Tensor) -> Tensor:
    return edges.reshape(-1, edges.shape[-1]).long().diff(dim=-1)


def _uniform_size(edges: Tensor) -> int | None:
    sizes = _sizes(edges)
    first = int(sizes[0, 0])
    is_uniform = bool((sizes[:, :-1] == first).all()) and bool((sizes[:, -1] <= first).all())
    return first if is_uniform and first > 0 else None


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
