"""Dense attention over gathered keys: exact block sparsity from PyTorch's own kernels, on every device.

Queries that read the same keys are computed together, so that no mask is left inside: plans in which all heads share
a map are grouped by rows, others run row by row, rows of one size in one call.
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from longtake.attention.backends.base import FLOATS, Limits, PlanBackend
from longtake.attention.backends.dense import attend
from longtake.attention.plan import BlockPlan, Ranges, RowGroup, block_of_tokens

_MAX_GATHERED = 1 << 24
"""Numbers of keys gathered at a time for rows of one size: 64 MiB in float32."""


class GatherSdpa(PlanBackend):
    """Keys of every group of rows are copied together and attended to densely."""

    name = "gather_sdpa"
    limits = Limits(devices=("cpu", "cuda", "mps", "xpu"), dtypes=FLOATS, plans="per_head", needs_plan=True)
    verified_on = frozenset({"cpu", "cuda"})

    def _execute_plan(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        wide = torch.promote_types(q.dtype, torch.float32)
        lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=wide) if return_lse else None
        run = _run_groups if _pays_to_group(plan) else _run_rows
        run(q, k, v, plan, scale, out, lse)
        return out, lse


def _pays_to_group(plan: BlockPlan) -> bool:
    """True if rows repeat, so that groups are fewer than half as many as rows; a map on a device is left there."""
    if plan.num_heads == 1:
        return True
    is_here = plan.counts.device.type == "cpu"
    return is_here and 2 * len(plan.row_groups) <= plan.num_heads * plan.counts.shape[1]


def _run_groups(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, out: Tensor, lse: Tensor | None
) -> None:
    groups = plan.row_groups
    # The same memory for every group: asking the system for new pages takes longer than copying.
    size = max((group.num_keys for group in groups if len(group.k_ranges) > 1), default=0) * k[:, 0].numel()
    needs_grad = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
    buffers = (None, None) if needs_grad else (k.new_empty(size), v.new_empty(size))
    for group in groups:
        part, part_lse = attend(
            _take_heads(_take(q, group.q_ranges), group),
            *(
                _take_heads(_take(x, group.k_ranges, buffer), group, q.shape[2] // x.shape[2])
                for x, buffer in zip((k, v), buffers, strict=True)
            ),
            scale=scale,
            return_lse=lse is not None,
        )
        heads = slice(None) if group.heads is None else list(group.heads)
        start = 0
        for first, stop in group.q_ranges:
            end = start + stop - first
            out[:, first:stop, heads] = part[:, start:end]
            if lse is not None and part_lse is not None:
                lse[:, heads, first:stop] = part_lse[:, :, start:end]
            start = end


def _take(x: Tensor, ranges: Ranges, buffer: Tensor | None = None) -> Tensor:
    """Join runs of tokens, in the buffer where there is one; a view where it is one run."""
    if len(ranges) == 1:
        start, stop = ranges[0]
        return x[:, start:stop]
    places = _token_places(ranges, x.device)
    if buffer is None:
        return x.index_select(1, places)
    shape = (x.shape[0], len(places), *x.shape[2:])
    # Selecting by index shares the copying among threads; joining slices would leave it to one.
    return torch.index_select(x, 1, places, out=buffer[: math.prod(shape)].view(shape))


@lru_cache(maxsize=512)
def _token_places(ranges: Ranges, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it is kept, and a later call may need gradients
        return torch.cat([torch.arange(start, stop, device=device) for start, stop in ranges])


def _take_heads(x: Tensor, group: RowGroup, queries_per_key: int = 1) -> Tensor:
    """Select the heads of a group; of keys, those that its queries share."""
    if group.heads is None:
        return x
    return x[:, :, [head // queries_per_key for head in group.heads]]


def _run_rows(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, out: Tensor, lse: Tensor | None) -> None:
    plan = plan.to(q.device) if plan.counts.device != q.device else plan
    batch, _, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    q_flat, k_flat, v_flat, out_flat = (x.reshape(-1, head_dim) for x in (q, k, v, out))
    samples = torch.arange(batch, device=q.device)[:, None, None]
    for heads, q_tokens, k_tokens in _rows_of_one_size(plan, num_heads, batch * head_dim):
        # (batch, rows, tokens) places among all (sample, token, head).
        q_places = (samples * q.shape[1] + q_tokens) * num_heads + heads[:, None]
        k_places = (samples * k.shape[1] + k_tokens) * num_kv_heads + heads[:, None] // (num_heads // num_kv_heads)
        # Every row is a sample with one head.
        q_rows, k_rows, v_rows = (
            flat.index_select(0, places.flatten()).view(-1, places.shape[-1], 1, head_dim)
            for flat, places in ((q_flat, q_places), (k_flat, k_places), (v_flat, k_places))
        )
        part, part_lse = attend(q_rows, k_rows, v_rows, scale=scale, return_lse=lse is not None)
        out_flat[q_places.flatten()] = part.reshape(-1, head_dim)
        if lse is not None and part_lse is not None:
            lse[samples, heads[:, None], q_tokens] = part_lse[:, 0].reshape(q_places.shape)


def _rows_of_one_size(plan: BlockPlan, num_heads: int, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield rows that have as many queries and read as many keys, a bounded number at a time.

    Args:
        plan: The plan, on the device of the tokens.
        num_heads: Query heads; the plan's one map is repeated for them.
        width: Numbers per key and row.

    Yields:
        The heads, (rows,); the tokens of the queries, (rows, queries of each); and of the keys, (rows, keys of each).
    """
    device = plan.counts.device
    num_rows = plan.counts.shape[1]
    q_edges = plan.q_edges.reshape(-1, num_rows + 1).long().expand(num_heads, -1)
    q_sizes, k_sizes = q_edges.diff(dim=-1), plan.keys_per_row.expand(num_heads, -1)
    sizes, members = torch.stack([q_sizes, k_sizes], dim=-1).flatten(0, 1).unique(dim=0, return_inverse=True)
    for number, (num_queries, num_keys) in enumerate(sizes.tolist()):
        if not num_queries:
            continue
        rows = (members == number).nonzero()[:, 0]
        for part in rows.split(max(1, _MAX_GATHERED // (num_keys * width))):
            heads, blocks = part // num_rows, part % num_rows
            q_tokens = q_edges[heads, blocks][:, None] + torch.arange(num_queries, device=device)
            yield heads, q_tokens, _key_tokens(plan, heads, blocks, num_keys)


def _key_tokens(plan: BlockPlan, heads: Tensor, blocks: Tensor, num_keys: int) -> Tensor:
    """(rows, num_keys): the keys that every row reads, ascending."""
    size = plan.uniform_block_sizes[1]
    of_map = heads % plan.counts.shape[0]
    if size is not None:
        # Only the last block of all may be shorter, and it stands last in its row.
        columns = plan.index[of_map, blocks, : -(-num_keys // size)].long()
        return (columns[..., None] * size + torch.arange(size, device=columns.device)).flatten(1)[:, :num_keys]
    k_blocks = block_of_tokens(plan.k_edges, plan.num_keys)
    is_read = plan.block_mask[of_map, blocks].gather(1, k_blocks[heads % k_blocks.shape[0]])
    return is_read.nonzero()[:, 1].unflatten(0, (len(heads), num_keys))
