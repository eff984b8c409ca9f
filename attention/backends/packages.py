"""Kernels of other packages: zentorch, flash-attn 2, 3 and 4, xformers, SageAttention and FlashInfer.

But for zentorch the project has no machine to run them on, so ``auto`` takes none of them; a run by name is compared
with PyTorch's attention like any other.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

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
from longtake.attention.backends.pytorch import Attention, sdpa
from longtake.attention.plan import BlockPlan

_FLASH4_BLOCK = 128
_FLASH4_SPARSE = (9, 10, 11)  # major compute capabilities
_WORKSPACE_BYTES = 128 << 20


def zentorch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Dense softmax attention in bfloat16 on processors with AVX512-BF16, as exact as ``sdpa``; arguments as there.

    Raises:
        RuntimeError: If the backend cannot run here.

    Source: ZenDNN's plugin for PyTorch (AMD, MIT), operator ``zentorch_sdpa``, which takes no bias.
    """
    if bias is not None:
        return sdpa(q, k, v, bias)
    return _zentorch_operator()(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))[0].transpose(1, 2)


@cache
def _zentorch_operator() -> Callable:
    fault = zentorch_fault()
    if fault is not None:
        raise RuntimeError(f"{fault.text}: {fault.hint}")
    import zentorch  # noqa: F401  two seconds: only where it is used

    return torch.ops.zentorch.zentorch_sdpa.default


@cache
def zentorch_fault() -> Reason | None:
    """Look for a reason why ``zentorch`` cannot run here."""
    if not torch.cpu.get_capabilities().get("avx512_bf16", False):
        text = "zentorch pays on processors with AVX512-BF16, and this one has not got it"
        return Reason(text, "arch", "Use 'sdpa'.")
    if find_spec("zentorch") is None:
        return Reason("zentorch is not installed", "missing_package", "pip install 'longtake[zentorch]'.")
    ours, built_for = (".".join(text.split(".")[:2]) for text in (torch.__version__, version("zentorch")))
    if ours != built_for:
        text = f"zentorch {version('zentorch')} is built for torch {built_for}, not {ours}"
        return Reason(text, "version", f"Install zentorch=={ours}.*.")
    return None


def fastest(device: torch.device, dtype: torch.dtype) -> Attention:
    """Choose the fastest exact dense attention for a device and dtype; all give the same result within rounding."""
    has_matrix_unit = torch.cpu.get_capabilities().get("amx_bf16", False)
    if device.type == "cpu" and dtype == torch.bfloat16 and not has_matrix_unit and zentorch_fault() is None:
        return zentorch
    return sdpa


class Zentorch(Backend):
    """AMD's fused attention in bfloat16 on the CPU."""

    name = "zentorch"
    limits = Limits(devices=("cpu",), dtypes=(torch.bfloat16,), lse=False, grouped=False, backward=False)
    verified_on = frozenset({"cpu"})

    @classmethod
    def available(cls) -> Verdict:
        fault = zentorch_fault()
        return Verdict() if fault is None else Verdict((fault,))

    @classmethod
    def _own_reasons(cls, request: AttentionRequest) -> Iterator[Reason]:
        if request.has_scale:
            yield Reason("it scales scores by head_dim ** -0.5 only")

    def _execute(self, call: AttentionCall) -> Result:
        return zentorch(call.q, call.k, call.v), None


class _DiffusersBackend(Backend):
    """A dense kernel that diffusers' attention dispatch calls."""

    dispatch_name: ClassVar[str]

    def _execute(self, call: AttentionCall) -> Result:
        from diffusers.models import attention_dispatch

        try:
            with attention_dispatch.attention_backend(self.dispatch_name):
                pass  # diffusers checks the installed version here, and not when a backend is passed by name
        except RuntimeError as error:
            raise self._unusable(str(error).rstrip("."), "version") from error
        result: Any = attention_dispatch.dispatch_attention_fn(
            *call[:3],
            scale=call.factor,
            attention_kwargs={"return_lse": True} if call.return_lse else {},
            backend=attention_dispatch.AttentionBackendName(self.dispatch_name),
        )
        return result if call.return_lse else (result, None)


class Flash(_DiffusersBackend):
    """flash-attn 2 (Dao, arXiv:2307.08691), dense."""

    name = dispatch_name = "flash"
    package = "flash-attn"
    module = "flash_attn"
    install = "pip install 'flash-attn>=2.6.3' --no-build-isolation (built from source: needs nvcc)"
    limits = Limits(min_capability=(8, 0), max_head_dim=256)


class Flash3(_DiffusersBackend):
    """flash-attn 3 for Hopper (Shah et al., arXiv:2407.08608), dense; diffusers' wrapper of it has no gradients."""

    name = "flash3"
    dispatch_name = "_flash_3"
    package = "flash-attn-3"
    module = "flash_attn_interface"
    install = "pip install flash-attn-3 --index-url https://download.pytorch.org/whl/cu130"
    limits = Limits(min_capability=(8, 0), max_head_dim=256, head_dim_step=8, backward=False)

    def _execute(self, call: AttentionCall) -> Result:
        out, lse = super()._execute(call)
        # diffusers gives (batch, queries, heads) here, and (batch, heads, queries) for flash-attn 2.
        return out, None if lse is None else lse.transpose(1, 2)


class Xformers(_DiffusersBackend):
    """xformers' memory-efficient attention: dense, and float32 on graphics cards too old for flash-attn."""

    name = dispatch_name = package = module = "xformers"
    install = "pip install 'xformers>=0.0.35' (torch 2.10 or newer, CUDA)"
    limits = Limits(
        dtypes=FLOATS[1:], min_capability=(5, 0), max_head_dim=256, head_dim_step=8, lse=False, grouped=False
    )


class Sage(_DiffusersBackend):
    """SageAttention 2 (arXiv:2410.02367): queries and keys in INT8, values in FP16 or FP8; approximate."""

    name = dispatch_name = "sage"
    exact = False
    package = module = "sageattention"
    install = "pip install 'sageattention>=2.1.1' (built from source: needs nvcc)"
    limits = Limits(min_capability=(8, 0), max_head_dim=128, lse=False, backward=False)


class Flash4(Backend):
    """flash-attn 4, dense, or with lists of full blocks of 128 on Hopper and Blackwell."""

    name = "flash4"
    package = "flash-attn-4"
    module = "flash_attn.cute"
    install = "pip install --pre flash-attn-4"
    limits = Limits(min_capability=(8, 0), max_head_dim=128, head_dim_step=8, plans="per_head", varying_blocks=False)

    @classmethod
    def _own_reasons(cls, request: AttentionRequest) -> Iterator[Reason]:
        plan, capability = request.plan, request.capability
        if plan is None:
            return
        if capability is not None and capability[0] not in _FLASH4_SPARSE:
            has = "".join(map(str, capability))
            yield Reason(f"on sm_{has} it has no block sparsity: that needs 9.x, 10.x or 11.x", "arch")
        if {plan.q_block, plan.k_block} != {_FLASH4_BLOCK}:
            sizes = f"{plan.q_block} x {plan.k_block}"
            yield Reason(f"blocks must be {_FLASH4_BLOCK} x {_FLASH4_BLOCK}, not {sizes} (None: varying)")

    def _execute(self, call: AttentionCall) -> Result:
        q, k, v, plan, _, return_lse = call
        sparse = {}
        if plan is not None:
            counts, index = plan.counts[None].to(q.device), plan.index[None].clamp(min=0).to(q.device)
            sparse["block_sparse_tensors"] = self._load("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch(
                mask_block_cnt=torch.zeros_like(counts),
                mask_block_idx=torch.zeros_like(index),
                full_block_cnt=counts.contiguous(),
                full_block_idx=index.contiguous(),
                block_size=(_FLASH4_BLOCK, _FLASH4_BLOCK),
            )
        result = self._load().flash_attn_func(q, k, v, softmax_scale=call.factor, return_lse=return_lse, **sparse)
        out, *rest = (result,) if isinstance(result, Tensor) else result
        return out, rest[0] if return_lse else None


class Flashinfer(Backend):
    """FlashInfer's block-sparse attention (arXiv:2501.01005): equal blocks of any size, one map for all heads."""

    name = "flashinfer"
    package = "flashinfer-python"
    module = "flashinfer"
    install = "pip install flashinfer-python (CUDA 12.9+, nvcc for its kernels)"
    limits = Limits(
        min_capability=(7, 5),
        max_head_dim=256,
        plans="shared",
        needs_plan=True,
        varying_blocks=False,
        backward=False,
    )
    token_dim = 0  # of q, k, v and out of one sample; heads are the other one

    @classmethod
    def _own_reasons(cls, request: AttentionRequest) -> Iterator[Reason]:
        size = request.plan.k_block if request.plan is not None else None
        if size is not None and request.num_keys % size:
            text = f"the {request.num_keys} keys must be a multiple of the block of {size}"
            yield Reason(text, hint="Take 'flashinfer_variable'.")

    def _execute(self, call: AttentionCall) -> Result:
        # Planning costs more than a call: a wrapper is kept as long as its plan lives.
        wrappers = _wrappers.setdefault(call.blocks, {})
        key = (self.name, call.q.device, call.q.dtype, call.q.shape[2:], call.k.shape[2], call.factor)
        if key not in wrappers:
            wrappers[key] = self._wrapper(call)
        results = [
            wrappers[key].run(*(x.movedim(0, self.token_dim) for x in sample), return_lse=True)
            for sample in zip(*call[:3], strict=True)
        ]
        out = torch.stack([out.movedim(self.token_dim, 0) for out, _ in results])
        # Sums of (tokens, heads) or (heads, tokens), logarithms to base 2.
        lse = torch.stack([lse.movedim(self.token_dim, 1) for _, lse in results]) * math.log(2)
        return out, lse if call.return_lse else None

    def _wrapper(self, call: AttentionCall) -> Any:
        plan, device, dtype = call.blocks, call.q.device, call.q.dtype
        wrapper = self._load().BlockSparseAttentionWrapper(_workspace(device))
        ends = torch.cat([plan.counts.new_zeros(1), plan.counts[0].cumsum(0, dtype=torch.int32)]).to(device)
        indices = plan.index[0][plan.index[0] >= 0].to(device)
        shape = (plan.num_queries, plan.num_keys, *plan.uniform_block_sizes, *_heads(call))
        wrapper.plan(ends, indices, *shape, sm_scale=call.factor, q_data_type=dtype)
        return wrapper


class FlashinferVariable(Flashinfer):
    """FlashInfer's block-sparse attention for blocks of any sizes, with a map for every head of keys."""

    name = "flashinfer_variable"
    limits = Limits(min_capability=(8, 0), max_head_dim=256, plans="per_head", needs_plan=True, backward=False)
    token_dim = 1

    @classmethod
    def _own_reasons(cls, request: AttentionRequest) -> Iterator[Reason]:
        if request.plan is not None and request.plan.num_heads > request.num_kv_heads:
            yield Reason(f"it takes a map for every head of keys ({request.num_kv_heads}), not of queries")

    def _wrapper(self, call: AttentionCall) -> Any:
        plan, device, num_maps = call.blocks, call.q.device, call.k.shape[2]
        wrapper = self._load().VariableBlockSparseAttentionWrapper(_workspace(device))
        sizes = [
            edges.reshape(-1, edges.shape[-1]).diff(dim=-1).expand(num_maps, -1).contiguous().to(device)
            for edges in (plan.q_edges, plan.k_edges)
        ]
        mask = plan.block_mask.expand(num_maps, -1, -1).contiguous().to(device)
        wrapper.plan(mask, *sizes, *_heads(call), sm_scale=call.factor, q_data_type=call.q.dtype)
        return wrapper


_wrappers: WeakKeyDictionary[BlockPlan, dict[tuple, Any]] = WeakKeyDictionary()


def _heads(call: AttentionCall) -> tuple[int, int, int]:
    """Heads of queries, heads of keys, channels of a head."""
    return call.q.shape[2], call.k.shape[2], call.q.shape[3]


@cache
def _workspace(device: torch.device) -> Tensor:
    """Memory shared by all calls on a device: they follow one another."""
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
