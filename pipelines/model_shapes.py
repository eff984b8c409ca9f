"""Sizes of a model's parts without loading any: from a folder's headers, or from the published shapes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from longtake.configs.families import ModelFamily
from longtake.pipelines.loading import check_model_folder

# Wan2.1's transformers; everything else of their configs is the class's default.
TRANSFORMERS: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "1.3B": {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
        "14B": {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40},
    }
)
UMT5_XXL: Mapping[str, int] = MappingProxyType(
    {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
)
PARTS = ("transformer", "text_encoder", "vae")
TIED = "encoder.embed_tokens.weight"  # the same memory as shared.weight


@dataclass(frozen=True)
class ModelShapes:
    """What there is to load.

    Attributes:
        configs: Config of transformer, text_encoder and vae, as their classes take it.
        numbers: Numbers of every parameter, by part and name.
        source: Where that is from.
    """

    configs: Mapping[str, Mapping[str, Any]]
    numbers: Mapping[str, Mapping[str, int]] = field(repr=False)
    source: str

    def weight_bytes(self, dtype: torch.dtype) -> dict[str, int]:
        """Bytes of every part when it is loaded in ``dtype``; what diffusers keeps in float32 stays in it."""
        kept = {"transformer": kept_in_float32(WanTransformer3DModel), "vae": kept_in_float32(AutoencoderKLWan)}
        return {
            part: sum(
                count * (4 if is_kept(name, kept.get(part, ())) else dtype.itemsize) for name, count in numbers.items()
            )
            for part, numbers in self.numbers.items()
        }


def shapes_of(family: ModelFamily, folder: Path | None = None) -> ModelShapes:
    """Sizes of a folder's parts, or of the family's published ones where there is no folder.

    Args:
        family: How the model is run.
        folder: A diffusers folder.

    Raises:
        ValueError: If the folder is no diffusers Wan folder, or there is none and the family's size is not known.
    """
    if folder is not None:
        check_model_folder(folder)
        configs = {part: _read_config(folder / part) for part in PARTS}
        return ModelShapes(configs, {part: _read_numbers(folder / part) for part in PARTS}, str(folder))
    if family.size is None:
        raise ValueError(f"this model family says no size, and {' or '.join(TRANSFORMERS)} is needed: give a folder.")
    configs = {"transformer": TRANSFORMERS[family.size], "text_encoder": UMT5_XXL, "vae": {}}
    return ModelShapes(configs, _published(family.size), f"published shapes of Wan2.1 {family.size}")


def make_transformer(
    config: Mapping[str, Any], dtype: torch.dtype, *, num_layers: int, device: str = "meta"
) -> WanTransformer3DModel:
    """A transformer with random weights, or of meta tensors, in the dtypes in which diffusers loads it."""
    with torch.device(device):
        model = WanTransformer3DModel(**_plain(config) | {"num_layers": num_layers})
    return _cast(model, dtype, kept_in_float32(WanTransformer3DModel))


def make_vae(config: Mapping[str, Any], dtype: torch.dtype, *, device: str = "meta") -> AutoencoderKLWan:
    """A VAE with random weights, or of meta tensors."""
    with torch.device(device):
        model = AutoencoderKLWan(**_plain(config))
    return _cast(model, dtype, kept_in_float32(AutoencoderKLWan))


def meta_text_encoder(config: Mapping[str, Any], dtype: torch.dtype, *, num_layers: int) -> UMT5EncoderModel:
    """A text encoder of meta tensors."""
    settings = UMT5Config(**dict(config) | {"num_layers": num_layers, "is_encoder_decoder": False})
    with torch.device("meta"):
        return _cast(UMT5EncoderModel(settings), dtype, ())


def kept_in_float32(cls: type[nn.Module]) -> tuple[str, ...]:
    """Modules that diffusers loads in float32 whatever is asked for."""
    return tuple(cls._keep_in_fp32_modules or ())


def is_kept(name: str, kept: tuple[str, ...]) -> bool:
    """Whether a parameter belongs to one of these modules."""
    return any(part in kept for part in name.split("."))


def _cast(model: nn.Module, dtype: torch.dtype, kept: tuple[str, ...]) -> Any:
    for name, parameter in model.named_parameters():
        if not is_kept(name, kept):
            parameter.data = parameter.data.to(dtype)
    return model.eval()


@lru_cache(maxsize=2)
def _published(size: str) -> dict[str, dict[str, int]]:
    models = {
        "transformer": make_transformer(
            TRANSFORMERS[size], torch.float32, num_layers=TRANSFORMERS[size]["num_layers"]
        ),
        "text_encoder": meta_text_encoder(UMT5_XXL, torch.float32, num_layers=UMT5_XXL["num_layers"]),
        "vae": make_vae({}, torch.float32),
    }
    return {part: {name: p.numel() for name, p in model.named_parameters()} for part, model in models.items()}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what only the file is about."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _read_numbers(folder: Path) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                numbers |= {name: prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
    if "shared.weight" in numbers:
        numbers.pop(TIED, None)
    return numbers
