"""Parts of a Wan model with random weights, or of meta tensors, in the dtypes in which diffusers loads them."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel


def make_transformer(
    config: Mapping[str, Any], dtype: torch.dtype, *, num_layers: int, device: str = "meta"
) -> WanTransformer3DModel:
    """A transformer of a config, with another number of layers."""
    with torch.device(device):
        settings: dict[str, Any] = {**_plain(config), "num_layers": num_layers}
        return _cast(WanTransformer3DModel(**settings), dtype)


def make_vae(config: Mapping[str, Any], dtype: torch.dtype, *, device: str = "meta") -> AutoencoderKLWan:
    """A VAE of a config."""
    with torch.device(device):
        return _cast(AutoencoderKLWan(**_plain(config)), dtype)


def _cast(model: ModelMixin, dtype: torch.dtype) -> Any:
    kept = set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what only the file is about."""
    return {key: value for key, value in config.items() if not key.startswith("_")}
