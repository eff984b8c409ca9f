"""Dense kernels of other packages: zentorch, flash-attn 2 and 3, xformers and SageAttention.

But for zentorch the project has not run them on a machine of its own, so ``auto`` takes none of them; a run by name is
compared with PyTorch's attention like any other.
"""

from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, ClassVar

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
    if (fault := _zentorch_fault()) is not None:
        raise RuntimeError(f"{fault.text}: {fault.hint}")
    import zentorch  # noqa: F401  two seconds: only where it is used

    return torch.ops.zentorch.zentorch_sdpa.default


@cache
def _zentorch_fault() -> Reason | None:
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
    if device.type == "cpu" and dtype == torch.bfloat16 and not has_matrix_unit and _zentorch_fault() is None:
        return zentorch
    return sdpa


class _Zentorch(Backend):
    """AMD's fused attention in bfloat16 on the CPU."""

    name = "zentorch"
    limits = Limits(devices=("cpu",), dtypes=(torch.bfloat16,), lse=False, grouped=False, backward=False)
    verified_on = frozenset({"cpu"})

    @classmethod
    def available(cls) -> Verdict:
        fault = _zentorch_fault()
        return Verdict() if fault is None else Verdict((fault,))

    @classmethod
    def _own_reasons(cls, request: AttentionRequest) -> Iterator[Reason]:
        if request.has_scale:
            yield Reason("it scales scores by head_dim ** -0.5 only")

    def _execute(self, call: AttentionCall) -> Result:
        return zentorch(call.q, call.k, call.v), None


class _DiffusersBackend(Backend):
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


class _Flash(_DiffusersBackend):
    """flash-attn 2 (Dao, arXiv:2307.08691), dense."""

    name = dispatch_name = "flash"
    package = "flash-attn"
    module = "flash_attn"
    install = "pip install 'flash-attn>=2.6.3' --no-build-isolation (built from source: needs nvcc)"
    limits = Limits(min_capability=(8, 0), max_head_dim=256)


class _Flash3(_DiffusersBackend):
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


class _Xformers(_DiffusersBackend):
    """xformers' memory-efficient attention: dense, and float32 on graphics cards too old for flash-attn."""

    name = dispatch_name = package = module = "xformers"
    install = "pip install 'xformers>=0.0.35' (torch 2.10 or newer, CUDA)"
    limits = Limits(
        dtypes=FLOATS[1:], min_capability=(5, 0), max_head_dim=256, head_dim_step=8, lse=False, grouped=False
    )


class _Sage(_DiffusersBackend):
    """SageAttention 2 (arXiv:2410.02367): queries and keys in INT8, values in FP16 or FP8; approximate."""

    name = dispatch_name = "sage"
    exact = False
    package = module = "sageattention"
    install = "pip install 'sageattention>=2.1.1' (built from source: needs nvcc)"
    limits = Limits(min_capability=(8, 0), max_head_dim=128, lse=False, backward=False)


BACKENDS = (_Zentorch, _Flash, _Flash3, _Xformers, _Sage)
