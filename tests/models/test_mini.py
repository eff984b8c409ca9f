"""The bundled folder is a complete diffusers pipeline of the documented geometry and size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline

import longtake.models
from longtake.evaluation.mini_world.scenes import held_back_scenes, render

FOLDER = Path(longtake.models.__file__).parent / "mini"


@pytest.fixture(scope="module")
def pipeline() -> WanPipeline:
    """The folder, read by diffusers itself."""
    return DiffusionPipeline.from_pretrained(FOLDER, local_files_only=True)


def test_parts_and_geometry(pipeline):
    assert type(pipeline) is WanPipeline
    assert tuple(pipeline.transformer.config.patch_size) == (1, 2, 2)
    assert pipeline.transformer.config.in_channels == pipeline.vae.config.z_dim
    assert (pipeline.vae_scale_factor_spatial, pipeline.vae_scale_factor_temporal) == (8, 4)
    assert pipeline.scheduler.config.shift == 3.0
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        assert all(torch.isfinite(parameter).all() for parameter in part.parameters())


def test_size_and_format():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 24e6
    assert {path.suffix for path in files} == {".json", ".safetensors"}


@torch.inference_mode()
def test_vae_rebuilds_unseen_scenes_without_drift_from_normalised_latents(pipeline):
    videos = [torch.from_numpy(render(scene, np.arange(49))) for scene in held_back_scenes(2)]
    video = torch.stack(videos).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0
    latents = pipeline.vae.encode(video).latent_dist.mode()
    error = ((pipeline.vae.decode(latents).sample - video) / 2.0).square().mean(dim=(0, 1, 3, 4))
    assert -10.0 * torch.log10(error.mean()) > 28.0
    assert error[-12:].mean() < 1.5 * error[:12].mean()
    mean, std = (torch.tensor(pipeline.vae.config[f"latents_{x}"]).view(1, -1, 1, 1, 1) for x in ("mean", "std"))
    normalised = (latents - mean) / std
    assert 0.7 < float(normalised.std()) < 1.3
    assert abs(float(normalised.mean())) < 0.3


@torch.inference_mode()
def test_prompts_reach_the_transformer(pipeline):
    prompts = [
        "a red circle bouncing over a navy striped background",
        "a green star circling over a teal plain background",
    ]
    embeds, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=32)
    latents = torch.randn(1, 12, 3, 8, 8, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1, -1)
    flow = pipeline.transformer(latents, torch.full((2,), 1000.0), embeds, return_dict=False)[0]
    assert flow.shape == latents.shape
    assert (flow[0] - flow[1]).abs().mean() > 0.05
