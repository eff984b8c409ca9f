"""oneDNN for the Wan VAE's small causal convolutions on the CPU."""

import torch
from diffusers import AutoencoderKLWan
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor
from torch.nn import functional

_HOOK = "longtake_onednn"


def use_onednn(vae: AutoencoderKLWan) -> None:
    """Send every causal convolution of a VAE to oneDNN whenever it runs in float32 on the CPU; once is enough.

    PyTorch unrolls a single small video into columns instead, which is three times slower at 64x64 pixels. Results
    differ from stock by rounding, in the streamed and in the whole decode alike. Weights stay as they are.

    Args:
        vae: The Wan VAE; hooks are put on its convolutions.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d):
            registry = HookRegistry.check_if_exists_or_initialize(module)
            if registry.get_hook(_HOOK) is None:
                registry.register_hook(_OneDnnConvolution(), _HOOK)


class _OneDnnConvolution(ModelHook):
    """``WanCausalConv3d.forward`` with the spatial padding left to the convolution."""

    def new_forward(self, module: WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        if x.device.type != "cpu" or x.dtype != torch.float32:
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
