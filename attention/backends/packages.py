"""Kernels of other packages: flash-attn 2, 3 and 4, xformers and SageAttention.

The project has no machine to run them on, so ``auto`` takes none of them; a run by name is compared with PyTorch's
attention like any other.
"""

from typing import ClassVar

import torch
from torch import Tensor

from longtake.attention.backends.base import AttentionRequest, Backend, Limits, Reason, Verdict
from longtake.attention.plan import BlockPlan

_BLOCK = 128
_SPARSE_ARCHITECTURES = (9, 10, 11)


class _DiffusersBackend(Backend):
    """A dense kernel that diffusers' attention dispatch calls."""

    dispatch_name: ClassVar[str]

    def _execute(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        from diffusers.models import attention_dispatch

        try:
            with attention_dispatch.attention_backend(self.dispatch_name):
                pass  # diffusers checks the installed version here, and not when a backend is passed by name
        except RuntimeError as error:
            raise self._unusable(str(error).rstrip("."), "version", f"Install with: {self.install}.") from error
        result = attention_dispatch.dispatch_attention_fn(
            q,
            k,
            v,
            scale=scale,
            attention_kwargs={"return_lse": True} if return_lse else {},
            backend=attention_dispatch.AttentionBackendName(self.dispatch_name),
        )
        out, lse = result if return_lse else (result, None)
        return out, lse


class Flash(_DiffusersBackend):
    """flash-attn 2 (Dao, arXiv:2307.08691), dense."""

    name = "flash"
    dispatch_name = "flash"
    package = "flash-attn"
    module = "flash_attn"
    install = "pip install 'flash-attn>=2.6.3' --no-build-isolation (built from source: needs nvcc)"
    limits = Limits(devices=("cuda",), min_capability=(8, 0), max_head_dim=256)


class Flash3(_DiffusersBackend):
    """flash-attn 3 for Hopper (Shah et al., arXiv:2407.08608), dense; diffusers' wrapper of it has no gradients."""

    name = "flash3"
    dispatch_name = "_flash_3"
    package = "flash-attn-3"
    module = "flash_attn_interface"
    install = "pip install flash-attn-3 --index-url https://download.pytorch.org/whl/cu130"
    limits = Limits(devices=("cuda",), min_capability=(8, 0), max_head_dim=256, head_dim_step=8, backward=False)

    def _execute(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        out, lse = super()._execute(q, k, v, plan, scale, return_lse)
        # diffusers gives (batch, queries, heads) here, and (batch, heads, queries) for flash-attn 2.
        return out, None if lse is None else lse.transpose(1, 2)


class Xformers(_DiffusersBackend):
    """xformers' memory-efficient attention: dense, and float32 on graphics cards too old for flash-attn."""

    name = "xformers"
    dispatch_name = "xformers"
    package = "xformers"
    module = "xformers"
    install = "pip install 'xformers>=0.0.35' (torch 2.10 or newer, CUDA)"
    limits = Limits(
        devices=("cuda",),
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
        min_capability=(5, 0),
        max_head_dim=256,
        head_dim_step=8,
        lse=False,
        grouped=False,
    )


class Sage(_DiffusersBackend):
    """SageAttention 2 (arXiv:2410.02367): queries and keys in INT8, values in FP16 or FP8; approximate."""

    name = "sage"
    dispatch_name = "sage"
    exact = False
    package = "sageattention"
    module = "sageattention"
    install = "pip install 'sageattention>=2.1.1' (built from source: needs nvcc)"
    limits = Limits(devices=("cuda",), min_capability=(8, 0), max_head_dim=128, lse=False, backward=False)


class Flash4(Backend):
    """flash-attn 4, dense, or with lists of full blocks of 128 on Hopper and Blackwell."""

    name = "flash4"
    package = "flash-attn-4"
    module = "flash_attn.cute"
    install = "pip install --pre flash-attn-4"
    limits = Limits(
        devices=("cuda",),
        min_capability=(8, 0),
        max_head_dim=128,
        head_dim_step=8,
        plans="per_head",
        varying_blocks=False,
    )

    @classmethod
    def supports(cls, request: AttentionRequest) -> Verdict:
        reasons = list(super().supports(request).reasons)
        plan = request.plan
        if plan is not None:
            if request.capability is not None and request.capability[0] not in _SPARSE_ARCHITECTURES:
                has = "".join(map(str, request.capability))
                reasons.append(Reason("arch", f"on sm_{has} it has no block sparsity: that needs 9.x, 10.x or 11.x"))
            if {plan.q_block, plan.k_block} != {_BLOCK}:
                sizes = f"{plan.q_block} x {plan.k_block}"
                reasons.append(Reason("feature", f"blocks must be {_BLOCK} x {_BLOCK}, not {sizes} (None: varying)"))
        return Verdict(tuple(reasons))

    def _execute(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        sparse = {}
        if plan is not None:
            counts, index = plan.counts[None].to(q.device), plan.index[None].clamp(min=0).to(q.device)
            sparse["block_sparse_tensors"] = self._load("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch(
                mask_block_cnt=torch.zeros_like(counts),
                mask_block_idx=torch.zeros_like(index),
                full_block_cnt=counts.contiguous(),
                full_block_idx=index.contiguous(),
                block_size=(_BLOCK, _BLOCK),
            )
        result = self._load().flash_attn_func(q, k, v, softmax_scale=scale, return_lse=return_lse, **sparse)
        out, *rest = (result,) if isinstance(result, Tensor) else result
        return out, rest[0] if return_lse else None
