"""Attention by PyTorch alone: dense, under a plan's mask, over gathered keys, and by flex_attention."""

import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longtake.attention.backends.base import (
    FLOATS,
    AttentionCall,
    AttentionRequest,
    Backend,
    Limits,
    Reason,
    Result,
    Verdict,
)
from longtake.attention.plan import BlockPlan, Ranges, RowGroup, block_lists, block_of_tokens

_MAX_SCORES = 1 << 24  # held at a time where attention is written out: 64 MiB in float32
_MAX_MASK = 1 << 26  # entries of the mask made at a time: 64 MiB
_MAX_GATHERED = 1 << 24  # numbers of keys gathered at a time for rows of one size: 64 MiB in float32
_FUSED = "_scaled_dot_product_flash_attention_for_cpu"  # behind the public function: it is private and may go
MAX_KEPT_MASK = 1 << 20
"""Entries of a mask that is kept as long as its plan lives: small calls would take as long to make it."""

Attention = Callable[..., Tensor]
"""(q, k, v, bias=None) -> out, all (batch, tokens, heads, head_dim) but the bias, (batch, heads, queries, keys)."""


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Dense softmax attention by PyTorch, on every device.

    Args:
        q: (batch, queries, heads, head_dim), rotated.
        k: (batch, keys, heads, head_dim), rotated.
        v: (batch, keys, heads, head_dim).
        bias: (batch or 1, heads or 1, queries or 1, keys), added to the scaled scores.

    Returns:
        (batch, queries, heads, head_dim), scores scaled by head_dim ** -0.5.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def attend(call: AttentionCall, mask: Tensor | None = None) -> Result:
    """PyTorch's own attention, whatever the call's plan, with the log-sum-exp where it is asked for.

    On the CPU the fused kernel gives both. On other devices, and where gradients are needed, PyTorch has no public
    function for it, and the attention is written out, exact but slower.

    ``mask`` is (1 or batch, 1 or heads, queries, keys), bool: True is read.
    """
    q, k, v = (x.transpose(1, 2) for x in call[:3])
    if not call.return_lse:
        is_grouped = q.shape[1] != k.shape[1]
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.factor, enable_gqa=is_grouped)
        return out.transpose(1, 2), None
    if q.device.type != "cpu" or not hasattr(torch.ops.aten, _FUSED) or call.needs_grad:
        out, lse = _written_out(q, k, v, call.factor, mask)
    else:
        bias = None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
        out, lse = getattr(torch.ops.aten, _FUSED)(q, k, v, attn_mask=bias, scale=call.factor)
    return out.transpose(1, 2), lse


def _written_out(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(batch, heads, tokens, head_dim) attention, some queries at a time."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(wide).repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    rows = max(1, _MAX_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    parts = []
    for start in range(0, q.shape[2], rows):
        scores = q[:, :, start : start + rows].to(wide) @ k.transpose(-1, -2) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, start : start + rows], -math.inf)
        lse = scores.logsumexp(-1)
        parts.append(((scores - lse[..., None]).exp() @ v, lse))
    out, lse = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    return out.to(q.dtype), lse


_ANYWHERE = Limits(devices=("cpu", "cuda", "mps", "xpu"), dtypes=FLOATS, plans="any")


class _Sdpa(Backend):
    """PyTorch's fused attention, on every device; it takes plans that leave nothing out."""

    name = "sdpa"
    limits = _ANYWHERE
    verified_on = frozenset({"cpu", "cuda"})

    @classmethod
    def _own_reasons(cls, request: AttentionRequest) -> Iterator[Reason]:
        if request.plan is not None and request.plan.density < 1:
            text = f"it computes every pair, and the plan keeps {request.plan.density:.0%} of them"
            yield Reason(text, hint="Take 'sdpa_masked' for PyTorch's attention with a mask.")

    def _execute(self, call: AttentionCall) -> Result:
        return attend(call)


class _SdpaMasked(Backend):
    """PyTorch's attention under the plan's mask, token by token: all pairs are computed, slower than dense."""

    name = "sdpa_masked"
    limits = replace(_ANYWHERE, plans="only")
    verified_on = frozenset({"cpu", "cuda"})

    def _execute(self, call: AttentionCall) -> Result:
        parts, start = [], 0
        for mask in _masks(call.blocks, call.q.device):
            stop = start + mask.shape[2]
            parts.append(attend(call._replace(q=call.q[:, start:stop]), mask))
            start = stop
        if len(parts) == 1:
            return parts[0]
        sums = [lse for _, lse in parts if lse is not None]
        return torch.cat([out for out, _ in parts], dim=1), torch.cat(sums, dim=2) if sums else None


def _masks(plan: BlockPlan, device: torch.device) -> Iterator[Tensor]:
    """Yield (1, 1 or heads, some queries, keys), bool, for all queries in order."""
    per_query = plan.num_heads * plan.num_keys
    if per_query * plan.num_queries > MAX_KEPT_MASK:
        moved = plan.to(device)
        for queries in torch.arange(plan.num_queries, device=device).split(max(1, _MAX_MASK // per_query)):
            yield moved.to_dense_mask(queries)[None]
        return
    if device not in plan.kept:
        with torch.inference_mode(False):  # a later call may need gradients
            plan.kept[device] = plan.to(device).to_dense_mask()[None].clone()
    yield plan.kept[device]


class _GatherSdpa(Backend):
    """Dense attention over gathered keys: exact block sparsity from PyTorch's own kernels, on every device.

    Queries that read the same keys are computed together, so that no mask is left inside: plans in which all heads
    share a map are grouped by rows, others run row by row, rows of one size in one call.
    """

    name = "gather_sdpa"
    limits = replace(_ANYWHERE, plans="only")
    verified_on = frozenset({"cpu", "cuda"})

    def _execute(self, call: AttentionCall) -> Result:
        q, plan = call.q, call.blocks
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        wide = torch.promote_types(q.dtype, torch.float32)
        lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=wide) if call.return_lse else None
        # Grouping pays if groups are fewer than half as many as rows; a map on a device is left there.
        is_here = plan.counts.device.type == "cpu"
        repeats = is_here and 2 * len(plan.row_groups) <= plan.num_heads * plan.counts.shape[1]
        run = _run_groups if plan.num_heads == 1 or repeats else _run_rows
        run(call, out, lse)
        return out, lse


def _run_groups(call: AttentionCall, out: Tensor, lse: Tensor | None) -> None:
    q, k, v, groups = call.q, call.k, call.v, call.blocks.row_groups
    # The same memory for every group: asking the system for new pages takes longer than copying.
    size = max((group.num_keys for group in groups if len(group.k_ranges) > 1), default=0) * k[:, 0].numel()
    buffers = (None, None) if call.needs_grad else (k.new_empty(size), v.new_empty(size))
    for group in groups:
        own_k, own_v = (
            _take_heads(_take(x, group.k_ranges, buffer), group, q.shape[2] // x.shape[2])
            for x, buffer in zip((k, v), buffers, strict=True)
        )
        part, part_lse = attend(call._replace(q=_take_heads(_take(q, group.q_ranges), group), k=own_k, v=own_v))
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


def _run_rows(call: AttentionCall, out: Tensor, lse: Tensor | None) -> None:
    q, k = call.q, call.k
    plan = call.blocks if call.blocks.counts.device == q.device else call.blocks.to(q.device)
    batch, _, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    q_flat, k_flat, v_flat, out_flat = (x.reshape(-1, head_dim) for x in (q, k, call.v, out))
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
        part, part_lse = attend(call._replace(q=q_rows, k=k_rows, v=v_rows))
        out_flat[q_places.flatten()] = part.reshape(-1, head_dim)
        if lse is not None and part_lse is not None:
            lse[samples, heads[:, None], q_tokens] = part_lse[:, 0].reshape(q_places.shape)


def _rows_of_one_size(plan: BlockPlan, num_heads: int, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield rows that have as many queries and read as many keys, a bounded number at a time.

    The plan's one map is repeated for all heads; ``width`` is the numbers per key and row. Each yields the heads,
    (rows,); the tokens of the queries, (rows, queries of each); and of the keys, (rows, keys of each).
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


_FLEX_BLOCK = 128  # edge of the blocks that flex's compiled kernels are made for
_MAX_FLEX_SCORES = 1 << 27  # 512 MiB in float32, and flex's uncompiled kernel holds several copies
_MAX_COMPILED = 64  # shapes compiled in a process before the next is refused


class _FlexEager(Backend):
    """flex_attention uncompiled: every score is computed and held. For debugging plans on short videos."""

    name = "flex_eager"
    limits = Limits(devices=("cpu", "cuda"), dtypes=FLOATS, plans="only", backward=False)
    verified_on = frozenset({"cpu"})

    @classmethod
    def _own_reasons(cls, request: AttentionRequest) -> Iterator[Reason]:
        scores = request.batch * request.num_heads * request.num_queries * request.num_keys
        if scores > _MAX_FLEX_SCORES:
            text = f"it holds all {scores:,} scores, and {_MAX_FLEX_SCORES:,} are the most"
            yield Reason(text, hint="Take 'flex' or 'gather_sdpa'.")

    def _execute(self, call: AttentionCall) -> Result:
        from torch.nn.attention.flex_attention import flex_attention

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            return _flex(flex_attention, call)


class _Flex(Backend):
    """flex_attention compiled, once per shape: half a minute on a CPU the first time, and only by name there."""

    name = "flex"
    limits = Limits(devices=("cpu", "cuda"), dtypes=FLOATS[1:], min_capability=(7, 5), plans="only")
    verified_on = frozenset({"cpu"})

    @classmethod
    def available(cls) -> Verdict:
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is not None:
            return Verdict()
        text, hint = f"it needs a C++ compiler (no {compiler!r} found)", "Install g++, or name a C++ compiler in CXX."
        return Verdict((Reason(text, "no_compiler", hint),))

    @classmethod
    def _own_reasons(cls, request: AttentionRequest) -> Iterator[Reason]:
        if request.device != "cpu":
            return
        if request.return_lse:
            yield Reason("compiled for the CPU it does not return the log-sum-exp")
        if request.needs_grad:
            yield Reason("compiled for the CPU it has no gradients")
        if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
            yield Reason("compiled for the CPU it needs AVX2 or more", "arch")

    def _execute(self, call: AttentionCall) -> Result:
        from torch._dynamo.exc import FailOnRecompileLimitHit

        with torch._dynamo.config.patch(recompile_limit=_MAX_COMPILED):
            try:
                return _flex(_compiled_flex(), call)
            except FailOnRecompileLimitHit as error:
                text = f"it has been compiled for {_MAX_COMPILED} shapes, the most in a process"
                hint = "Take 'gather_sdpa', which compiles nothing, or keep the number of keys constant."
                raise self._unusable(text, "feature", hint) from error


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # The whole graph or an error: what is not compiled would run uncompiled, with all scores in memory.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _flex(kernel: Any, call: AttentionCall) -> Result:
    from torch.nn.attention.flex_attention import AuxRequest

    q, k, v = (x.transpose(1, 2) for x in call[:3])
    kept, key = call.blocks.kept, ("flex", q.device)
    if key not in kept:
        kept[key] = _flex_block_mask(call.blocks.to(q.device))
    options = {"block_mask": kept[key], "scale": call.factor, "enable_gqa": q.shape[1] != k.shape[1]}
    if not call.return_lse:
        return kernel(q, k, v, **options).transpose(1, 2), None
    out, extra = kernel(q, k, v, **options, return_aux=AuxRequest(lse=True))
    return out.transpose(1, 2), extra.lse


def _flex_block_mask(plan: BlockPlan, block_size: int = _FLEX_BLOCK) -> Any:
    """Make a ``BlockMask`` of a plan without an order, always with a mask function.

    Without a mask function the eager kernel ignores the lists of blocks and computes dense attention. Blocks of other
    sizes are laid over a grid of ``block_size``; the function decides inside those that are partly read.
    """
    from torch.nn.attention.flex_attention import BlockMask

    q_blocks = block_of_tokens(plan.q_edges, plan.num_queries)
    k_blocks = block_of_tokens(plan.k_edges, plan.num_keys)
    masks = plan.block_mask

    def reads(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = q_blocks[head if q_blocks.shape[0] > 1 else 0, query]
        column = k_blocks[head if k_blocks.shape[0] > 1 else 0, key]
        return masks[head if masks.shape[0] > 1 else 0, row, column]

    rows = _shared_tokens(q_blocks, plan.q_edges.shape[-1] - 1, block_size)
    columns = _shared_tokens(k_blocks, plan.k_edges.shape[-1] - 1, block_size)
    # Pairs of blocks that a tile touches, and that are read: exact in double precision.
    read = rows @ masks.double() @ columns.transpose(-1, -2)
    there = rows.sum(-1)[..., :, None] * columns.sum(-1)[..., None, :]
    partly, fully = block_lists((read > 0) & (read < there)), block_lists(read == there)
    lists = (part[None].contiguous() for part in (*partly, *fully))
    lengths = (plan.num_queries, plan.num_keys)
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=block_size, mask_mod=reads, seq_lengths=lengths)


def _shared_tokens(block_of_token: Tensor, num_blocks: int, tile_size: int) -> Tensor:
    """(1 or heads, tiles, blocks), float64: 1 where a tile and a block share tokens."""
    heads, num_tokens = block_of_token.shape
    device = block_of_token.device
    tiles = (torch.arange(num_tokens, device=device) // tile_size).expand_as(block_of_token)
    shared = torch.zeros(heads, -(-num_tokens // tile_size), num_blocks, dtype=torch.float64, device=device)
    shared[torch.arange(heads, device=device)[:, None].expand_as(tiles), tiles, block_of_token] = 1
    return shared


BACKENDS = (_Sdpa, _SdpaMasked, _GatherSdpa, _Flex, _FlexEager)
