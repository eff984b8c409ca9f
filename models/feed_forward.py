"""A block's feed-forward with the activation in the first product's kernel, where the CPU computes in bfloat16."""

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch import Tensor, nn


def feed_forward(ffn: nn.Module, x: Tensor) -> Tensor:
    """Run diffusers' feed-forward; in bfloat16 on the CPU, GELU happens before the product is rounded.

    Stock rounds to bfloat16 between product and activation, and reads the widest tensor of the block once more.
    Anything but a plain linear layer (LoRA, a quantised layer, one with hooks) is called as it is.

    Args:
        ffn: ``FeedForward`` of a ``WanTransformerBlock``.
        x: (batch, tokens, dim).

    Returns:
        (batch, tokens, dim).
    """
    if not (_is_plain(ffn) and _takes(x)):
        return ffn(x)
    activation, *rest = ffn.net
    proj = activation.proj
    hidden = torch.ops.mkldnn._linear_pointwise(x, proj.weight, proj.bias, "gelu", [], activation.approximate)
    for module in rest:
        hidden = module(hidden)
    return hidden


def _takes(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and not torch.is_grad_enabled()
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _is_plain(ffn: nn.Module) -> bool:
    if type(ffn) is not FeedForward or type(ffn.net[0]) is not GELU or type(ffn.net[0].proj) is not nn.Linear:
        return False
    proj = ffn.net[0].proj
    return proj.weight.dtype == torch.bfloat16 and not any(_is_hooked(part) for part in (ffn, ffn.net[0], proj))


def _is_hooked(module: nn.Module) -> bool:
    # Hooks of torch, of accelerate and of diffusers: the last two replace the instance's ``forward``.
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)
