"""Faster CPU kernels for the three operations of the Wan VAE that stock PyTorch runs slowly on small pictures."""

import torch
from diffusers import AutoencoderKLWan
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm, WanUpsample
from torch import Tensor
from torch.nn import functional

from longtake.models.offload import offload_hooks

_HOOK = "longtake_kernel"
_EPSILON = 1e-12  # of functional.normalize, in units of the norm


def use_fast_kernels(vae: AutoencoderKLWan) -> None:
    """Put hooks on a VAE's causal convolutions, norms and upsamplers that take faster ways on the CPU; once is enough.

    Results differ from stock by rounding, in the streamed and in the whole decode alike. Weights stay as they are, and
    on other devices everything is stock.

    * Convolutions go to oneDNN, which also pads: in float32 PyTorch unrolls a single small video into columns
      instead, three times slower at 64x64 pixels.
    * Norms sum squares over channels by ``sum``: the vector norm over a strided dimension that stock takes is about
      ten times slower than that, and half of the decode in float32.
    * Upsamplers repeat pixels in one copy instead of three.

    Args:
        vae: The Wan VAE.
    """
    for module in vae.modules():
        hook = _hook_for(module)
        # Weights that offloading brings for a call would be missing to a hook outside of it.
        if hook is None or offload_hooks(module):
            continue
        registry = HookRegistry.check_if_exists_or_initialize(module)
        if registry.get_hook(_HOOK) is None:
            registry.register_hook(hook, _HOOK)


def _onednn_takes(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _hook_for(module: torch.nn.Module) -> ModelHook | None:
    if isinstance(module, WanCausalConv3d) and torch.backends.mkldnn.is_available():
        return _OneDnnConvolution()
    if isinstance(module, WanRMS_norm) and module.channel_first and not isinstance(module.bias, Tensor):
        return _SummedNorm()
    if isinstance(module, WanUpsample) and module.mode == "nearest-exact" and module.scale_factor == (2.0, 2.0):
        return _RepeatedPixels()
    return None


class _OneDnnConvolution(ModelHook):
    """``WanCausalConv3d.forward`` with the spatial padding left to the convolution."""

    def new_forward(self, module: WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        if x.device.type != "cpu" or not _onednn_takes(x.dtype):
            return self.fn_ref.original_forward(x, cache_x)
        width, _, height, _, num_missing, _ = module._padding
        if cache_x is not None and num_missing > 0:
            x = torch.cat([cache_x.to(x.device), x], dim=2)
            num_missing -= cache_x.shape[2]
        if num_missing > 0:
            x = functional.pad(x, (0, 0, 0, 0, num_missing, 0))
        return torch.mkldnn_convolution(
            x, module.weight, module.bias, [0, height, width], module.stride, module.dilation, module.groups
        )


class _SummedNorm(ModelHook):
    """``WanRMS_norm.forward`` over channels, squares summed in float32."""

    def new_forward(self, module: WanRMS_norm, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return self.fn_ref.original_forward(x)
        power = x.square().sum(dim=1, keepdim=True, dtype=torch.float32)
        factor = power.clamp_min_(_EPSILON**2).rsqrt_().mul_(module.scale)
        return (x * factor.to(x.dtype)).mul_(module.gamma.to(x.dtype))


class _RepeatedPixels(ModelHook):
    """``WanUpsample.forward`` by two in both directions; the same bits."""

    def new_forward(self, module: WanUpsample, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return self.fn_ref.original_forward(x)
        batch, channels, height, width = x.shape
        twice = x[..., None, :, None].expand(batch, channels, height, 2, width, 2)
        return twice.reshape(batch, channels, 2 * height, 2 * width)
