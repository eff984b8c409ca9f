"""PyTorch's flex_attention: a kernel compiled for the plan, or the uncompiled one for debugging.

Masks come from ``BlockPlan.to_flex`` and always carry a mask function: uncompiled, the lists of blocks alone are
ignored, and the result is dense attention without a word.
"""

import os
import shutil
import warnings
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longtake.attention.backends.base import (
    FLOATS,
    AttentionRequest,
    Backend,
    BackendUnavailable,
    Limits,
    Reason,
    Verdict,
)
from longtake.attention.plan import BlockPlan

BLOCK = 128
"""Edge of the kernel's blocks: what the compiled kernels are made for."""

MAX_EAGER_SCORES = 1 << 27
"""Scores that the uncompiled kernel may hold, 512 MiB in float32; it holds several copies."""

MAX_COMPILED = 64
"""Shapes compiled in a process before the next is refused."""


class FlexEager(Backend):
    """Uncompiled: every score is computed and held. For debugging plans on short videos."""

    name = "flex_eager"
    limits = Limits(devices=("cpu", "cuda"), dtypes=FLOATS, plans="per_head", needs_plan=True, backward=False)
    verified_on = frozenset({"cpu"})

    @classmethod
    def supports(cls, request: AttentionRequest) -> Verdict:
        reasons = super().supports(request).reasons
        scores = request.batch * request.num_heads * request.num_queries * request.num_keys
        if scores > MAX_EAGER_SCORES:
            text = f"it holds all {scores:,} scores, and {MAX_EAGER_SCORES:,} are the most"
            reasons = (*reasons, Reason("feature", text, "Take 'flex' or 'gather_sdpa'."))
        return Verdict(reasons)

    def _execute(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        from torch.nn.attention.flex_attention import flex_attention

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            return _call(flex_attention, q, k, v, flex_mask(plan, q.device), scale, return_lse)


class Flex(Backend):
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
        reasons = []
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            hint = "Install g++, or name a C++ compiler in CXX."
            reasons.append(Reason("no_compiler", f"it needs a C++ compiler (no {compiler!r} found)", hint))
        return Verdict(tuple(reasons))

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

    def _execute(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        with torch._dynamo.config.patch(recompile_limit=MAX_COMPILED):
            try:
                return _call(_compiled(), q, k, v, flex_mask(plan, q.device), scale, return_lse)
            except torch._dynamo.exc.FailOnRecompileLimitHit as error:
                hint = "Take 'gather_sdpa', which compiles nothing, or keep the number of keys constant."
                raise BackendUnavailable(
                    f"backend 'flex' has been compiled for {MAX_COMPILED} shapes, the most in a process. {hint}",
                    backend=self.name,
                    code="feature",
                    hint=hint,
                ) from error


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # The whole graph or an error: what is not compiled would run uncompiled, with all scores in memory.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


_masks: WeakKeyDictionary[BlockPlan, dict[str, Any]] = WeakKeyDictionary()


def flex_mask(plan: BlockPlan, device: torch.device) -> Any:
    """The plan's block mask on a device, made once as long as the plan lives."""
    masks = _masks.setdefault(plan, {})
    if str(device) not in masks:
        masks[str(device)] = plan.to_flex(block_size=BLOCK, device=device)
    return masks[str(device)]


def _call(
    kernel: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    is_grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not return_lse:
        return kernel(q, k, v, block_mask=mask, scale=scale, enable_gqa=is_grouped).transpose(1, 2), None
    from torch.nn.attention.flex_attention import AuxRequest

    out, extra = kernel(q, k, v, block_mask=mask, scale=scale, enable_gqa=is_grouped, return_aux=AuxRequest(lse=True))
    return out.transpose(1, 2), extra.lse
