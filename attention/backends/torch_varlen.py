"""PyTorch's variable-length attention: groups of rows of a plan are sequences, many of them in one kernel.

The kernel exists on CUDA only and the project has not run it there, so ``auto`` passes it by; how sequences are packed
and unpacked is tested on the CPU with a kernel written out.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from longtake.attention.backends.base import Backend, Limits, Reason, Verdict
from longtake.attention.backends.gather_sdpa import put, take, take_heads
from longtake.attention.plan import BlockPlan, RowGroup

SINCE = (2, 13)
"""Version of PyTorch whose function this is written for."""

MAX_GATHERED = 1 << 27
"""Numbers of keys packed for one call, 256 MiB in bfloat16."""


class TorchVarlen(Backend):
    """``torch.nn.attention.varlen``: flash-attn within PyTorch, exact block sparsity by packing gathered keys."""

    name = "torch_varlen"
    limits = Limits(devices=("cuda",), min_capability=(8, 0), max_head_dim=256, head_dim_step=8, plans="per_head")

    @classmethod
    def available(cls) -> Verdict:
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= SINCE:
            return Verdict()
        text = f"torch {torch.__version__} has no such kernel, or one without groups of heads"
        return Verdict((Reason("version", text, f"Install torch {'.'.join(map(str, SINCE))} or newer."),))

    def _execute(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        everything = RowGroup(None, ((0, q.shape[1]),), ((0, k.shape[1]),))
        groups = (everything,) if plan is None else plan.group_rows()
        if plan is not None and plan.num_heads > 1:
            # Heads differ: each is a sequence of its own, with a single head.
            groups = tuple(RowGroup(group.heads or tuple(range(q.shape[2])), *_ranges(group)) for group in groups)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32) if return_lse else None
        for pack in _packs(groups, k.shape[0] * k.shape[2] * k.shape[3]):
            _run_pack(self._kernel(), q, k, v, pack, scale, out, lse)
        return out, lse

    def _kernel(self) -> Callable:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn


def _ranges(group: RowGroup) -> tuple:
    return group.q_ranges, group.k_ranges


def _packs(groups: Sequence[RowGroup], width: int) -> Iterator[list[RowGroup]]:
    """Groups whose gathered keys fit into ``MAX_GATHERED`` together, at least one at a time."""
    pack: list[RowGroup] = []
    size = 0
    for group in groups:
        if pack and size + group.num_keys * width > MAX_GATHERED:
            yield pack
            pack, size = [], 0
        pack.append(group)
        size += group.num_keys * width
    yield pack


def _run_pack(
    kernel: Callable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pack: list[RowGroup],
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """One kernel for several groups: every (group, sample), or (group, sample, head), is a sequence."""
    from torch.nn.attention.varlen import AuxRequest

    is_split = pack[0].heads is not None
    per_key = q.shape[2] // k.shape[2]
    queries = [_sequences(take_heads(take(q, group.q_ranges), group), is_split) for group in pack]
    keys, values = (
        [_sequences(take_heads(take(x, group.k_ranges), group, per_key), is_split) for group in pack] for x in (k, v)
    )
    result = kernel(
        *(torch.cat([part.flatten(0, 1) for part in parts]) for parts in (queries, keys, values)),
        *(_ends(parts) for parts in (queries, keys)),
        *(max(part.shape[1] for part in parts) for parts in (queries, keys)),
        return_aux=None if lse is None else AuxRequest(lse=True),
        scale=scale,
        enable_gqa=not is_split and per_key > 1,
    )
    joint, joint_lse = (result, None) if lse is None else result
    lengths = [part.shape[0] * part.shape[1] for part in queries]
    # (heads, queries), whatever the function's documentation says.
    sums = [None] * len(pack) if lse is None else joint_lse.transpose(0, 1).split(lengths)
    for group, part, part_lse in zip(pack, joint.split(lengths), sums, strict=True):
        rows = _samples(part, group, q.shape[0])
        put(out, lse, group, rows, None if lse is None else _samples(part_lse, group, q.shape[0]).transpose(1, 2))


def _sequences(x: Tensor, is_split: bool) -> Tensor:
    """(sequences, tokens, heads of each, head_dim) of (batch, tokens, heads, head_dim)."""
    return x.transpose(1, 2).flatten(0, 1)[:, :, None] if is_split else x


def _samples(part: Tensor, group: RowGroup, batch: int) -> Tensor:
    """The reverse: (batch, tokens, heads, ...) of (all tokens of the group, heads of each, ...)."""
    part = part.unflatten(0, (-1, group.num_queries))
    if group.heads is None:
        return part
    return part.unflatten(0, (batch, len(group.heads))).transpose(1, 2).flatten(2, 3)


def _ends(parts: Sequence[Tensor]) -> Tensor:
    """(sequences + 1,), int32: where every sequence begins, and the end."""
    lengths = [part.shape[1] for part in parts for _ in range(part.shape[0])]
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=parts[0].device)
