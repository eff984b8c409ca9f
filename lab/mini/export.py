"""Write the trained parts as a complete diffusers folder."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

from lab.mini.runtime import console
from lab.mini.text import build_tokenizer
from lab.mini.transformer import MiniModel
from lab.mini.vae import load_vae

SAMPLER_SHIFT = 3.0  # of the four guided Euler steps that ship


def _half(module: Any) -> Any:
    """Return the module in float16 in standard memory layout; loaders widen it back to float32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.half().contiguous()
    return module


def load_model(checkpoint: Path, *, use_live: bool = False) -> MiniModel:
    """Return the averaged (or live) weights of a transformer checkpoint, float32, on the CPU."""
    model = MiniModel()
    saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
    model.load_state_dict(saved["live" if use_live else "average"])
    return model.eval()


def export_folder(work: Path, folder: Path, *, use_live: bool = False) -> None:
    """Write ``model_index.json`` and the five parts to ``folder``.

    Transformer and VAE are stored in float16; the text encoder, small, in float32, because transformers loads a
    checkpoint in the type it was stored in.

    Args:
        work: Folder with the VAE's checkpoint, ``latents.json`` and ``transformer.pt``.
        folder: The diffusers folder to make or refresh.
        use_live: Take the last weights instead of their average.
    """
    statistics = json.loads((work / "latents.json").read_text())
    vae = load_vae(work)
    vae.register_to_config(latents_mean=statistics["mean"], latents_std=statistics["std"])
    if (work / "transformer.pt").exists():
        model = load_model(work / "transformer.pt", use_live=use_live)
    else:
        torch.manual_seed(0)
        model = MiniModel().eval()
    # A half-precision folder that names its type would load as such; the parts' configurations do not.
    pipeline = WanPipeline(
        tokenizer=cast(Any, build_tokenizer()),  # diffusers declares a factory
        text_encoder=model.text_encoder,
        transformer=_half(model.transformer),
        vae=_half(vae),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SAMPLER_SHIFT, stochastic_sampling=True),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    console.print(f"{folder}: {size / 1e6:.1f} MB")
