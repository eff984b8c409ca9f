"""PyTorch's flex_attention: a kernel compiled for the plan, or the uncompiled one for debugging."""

import os
import shutil
import warnings
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longtake.attention.backends.base import FLOATS, AttentionRequest, Limits, PlanBackend, Reason, Verdict
from longtake.attention.plan import BlockPlan, block_of_tokens

_BLOCK = 128  # edge of the blocks that the compiled kernels are made for
_MAX_EAGER_SCORES = 1 << 27  # 512 MiB in float32, and the uncompiled kernel holds several copies
_MAX_COMPILED = 64
"""Shapes compiled in a process before the next is refused."""


class FlexEager(PlanBackend):
    """Uncompiled: every score is computed and held. For debugging plans on short videos."""

    name = "flex_eager"
    limits = Limits(devices=("cpu", "cuda"), dtypes=FLOATS, plans="per_head", needs_plan=True, backward=False)
    verified_on = frozenset({"cpu"})

    @classmethod
    def supports(cls, request: AttentionRequest) -> Verdict:
        reasons = super().supports(request).reasons
        scores = request.batch * request.num_heads * request.num_queries * request.num_keys
        if scores > _MAX_EAGER_SCORES:
            text = f"it holds all {scores:,} scores, and {_MAX_EAGER_SCORES:,} are the most"
            reasons = (*reasons, Reason("feature", text, "Take 'flex' or 'gather_sdpa'."))
        return Verdict(reasons)

    def _execute_plan(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        from torch.nn.attention.flex_attention import flex_attention

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            return _call(flex_attention, q, k, v, plan, scale, return_lse)


class Flex(PlanBackend):
    """Compiled, once per shape: half a minute on a CPU the first time, and only when asked for by name there."""

    name = "flex"
    limits = Limits(
        devices=("cpu", "cuda"),
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
        min_capability=(7, 5),
        plans="per_head",
        needs_plan=True,
    )
    verified_on = frozenset({"cpu"})

    @classmethod
    def available(cls) -> Verdict:
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is not None:
            return Verdict()
        hint = "Install g++, or name a C++ compiler in CXX."
        return Verdict((Reason("no_compiler", f"it needs a C++ compiler (no {compiler!r} found)", hint),))

    @classmethod
    def supports(cls, request: AttentionRequest) -> Verdict:
        reasons = list(super().supports(request).reasons)
        if request.device == "cpu":
            if request.return_lse:
                reasons.append(Reason("feature", "compiled for the CPU it does not return the log-sum-exp"))
            if request.needs_grad:
                reasons.append(Reason("feature", "compiled for the CPU it has no gradients"))
            if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
                reasons.append(Reason("arch", "compiled for the CPU it needs AVX2 or more"))
        return Verdict(tuple(reasons))

    def _execute_plan(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        from torch._dynamo.exc import FailOnRecompileLimitHit

        with torch._dynamo.config.patch(recompile_limit=_MAX_COMPILED):
            try:
                return _call(_compiled(), q, k, v, plan, scale, return_lse)
            except FailOnRecompileLimitHit as error:
                text = f"it has been compiled for {_MAX_COMPILED} shapes, the most in a process"
                hint = "Take 'gather_sdpa', which compiles nothing, or keep the number of keys constant."
                raise self._unusable(text, "feature", hint) from error


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # The whole graph or an error: what is not compiled would run uncompiled, with all scores in memory.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


_masks: WeakKeyDictionary[BlockPlan, dict[str, Any]] = WeakKeyDictionary()


def _call(
    kernel: Any, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    masks = _masks.setdefault(plan, {})
    if str(q.device) not in masks:
        masks[str(q.device)] = flex_block_mask(plan.to(q.device))
    options = {"block_mask": masks[str(q.device)], "scale": scale, "enable_gqa": q.shape[2] != k.shape[2]}
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not return_lse:
        return kernel(q, k, v, **options).transpose(1, 2), None
    from torch.nn.attention.flex_attention import AuxRequest

    out, extra = kernel(q, k, v, **options, return_aux=AuxRequest(lse=True))
    return out.transpose(1, 2), extra.lse


def _tile_counts(plan: BlockPlan, block_size: int) -> tuple[Tensor, Tensor]:
    """Two (1 or heads, query tiles, key tiles) bool tensors: something of a tile is read, everything is read."""
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


def flex_block_mask(plan: BlockPlan, block_size: int = _BLOCK) -> Any:
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

    some, every = _tile_counts(plan, block_size)
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
