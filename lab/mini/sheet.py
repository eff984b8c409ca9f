"""Look at what the mini model makes: contact sheets of held-back prompts and of VAE reconstructions."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from torch import Tensor

from lab.mini.runtime import autocast
from lab.mini.teacher_forcing import TeacherForcingPlan, predict_flow, teacher_forcing
from lab.mini.text import build_tokenizer, embed_prompts
from lab.mini.transformer import (
    FLOW_SHIFT,
    FRAMES_PER_BLOCK,
    NUM_BLOCKS,
    TOKEN_SIDE,
    MiniModel,
)
from lab.mini.vae import Z_DIM, decode_stream
from longtake.evaluation.mini_world.scenes import describe, held_back_scenes


def sampler_sigmas(num_steps: int) -> list[float]:
    """Return the flow-shifted noise shares of a block's steps, first 1, without the final 0."""
    uniform = [1.0 - step / num_steps for step in range(num_steps)]
    return [FLOW_SHIFT * u / (1.0 + (FLOW_SHIFT - 1.0) * u) for u in uniform]


@torch.inference_mode()
def sample_clips(
    model: MiniModel, prompts: list[str], *, num_steps: int = 4, renoise: bool = True, seed: int = 0
) -> Tensor:
    """Make one 21-frame clip per prompt block by block with full context; slow and obvious.

    Args:
        model: Transformer and text encoder.
        prompts: Captions.
        num_steps: Denoising steps per block.
        renoise: Predict x0 and noise it again at every step, as few-step models do; else Euler.
        seed: Of the noise.

    Returns:
        (prompts, z, 21, 8, 8) normalised latents.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    embeds = embed_prompts(build_tokenizer(), model.text_encoder, prompts)
    shape = (len(prompts), Z_DIM, NUM_BLOCKS * FRAMES_PER_BLOCK, 8, 8)
    clean = torch.zeros(shape, device=device)
    sigmas = [*sampler_sigmas(num_steps), 0.0]
    for index in range(NUM_BLOCKS):
        # Later blocks would be computed for nothing: the plan grows with the clip.
        plan = TeacherForcingPlan(
            num_blocks=index + 1, frames_per_block=FRAMES_PER_BLOCK, rows=TOKEN_SIDE, columns=TOKEN_SIDE
        )
        stop = (index + 1) * FRAMES_PER_BLOCK
        part = slice(stop - FRAMES_PER_BLOCK, stop)
        x = torch.randn((len(prompts), Z_DIM, FRAMES_PER_BLOCK, 8, 8), generator=generator).to(device)
        noisy = torch.zeros_like(clean[:, :, :stop])
        for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            noisy[:, :, part] = x
            timesteps = torch.full((len(prompts), index + 1), 1000.0 * sigma, device=device)
            with teacher_forcing(model.transformer, plan), autocast(device):
                flow = predict_flow(
                    model.transformer,
                    plan,
                    clean=clean[:, :, :stop],
                    noisy=noisy,
                    clean_timesteps=torch.zeros_like(timesteps),
                    noisy_timesteps=timesteps,
                    prompt_embeds=embeds,
                )[:, :, part].float()
            if renoise:
                fresh = torch.randn(x.shape, generator=generator).to(device)
                x = (1.0 - following) * (x - sigma * flow) + following * fresh
            else:
                x = x + (following - sigma) * flow
        clean[:, :, part] = x
    return clean


@torch.inference_mode()
def decode_clips(vae: AutoencoderKLWan, latents: Tensor, mean: list[float], std: list[float]) -> np.ndarray:
    """Decode normalised latents to (B, F, 64, 64, 3) uint8."""
    shift, scale = (torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1) for values in (mean, std))
    video = torch.cat(list(decode_stream(vae, latents * scale + shift, stride=20)), dim=2)
    return ((video.clamp(-1.0, 1.0) + 1.0) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()


def save_sheet(path: Path, rows: list[np.ndarray], *, every: int = 8, scale: int = 2) -> None:
    """Save one row of frames per video, every n-th frame, enlarged."""
    picture = np.concatenate([np.concatenate(list(row[::every]), axis=1) for row in rows], axis=0)
    height, width = picture.shape[:2]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).resize((width * scale, height * scale), Image.Resampling.NEAREST).save(path)


def held_back_prompts(count: int) -> list[str]:
    """Return the first ``count`` held-back captions."""
    return [describe(scene) for scene in held_back_scenes(count)]


def save_curves(work: Path, path: Path) -> None:
    """Plot the VAE's PSNR and the transformer's loss against minutes of training, from the stages' logs."""
    from matplotlib import pyplot

    def column(name: str, key: str) -> tuple[list[float], list[float]]:
        entries = [json.loads(line) for line in (work / f"{name}.jsonl").read_text().splitlines()]
        kept = [entry for entry in entries if key in entry]
        return [entry["seconds"] / 60.0 for entry in kept], [entry[key] for entry in kept]

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.4))
    left.plot(*column("vae", "psnr"), label="encoder and decoder: 1, 9, 17, then 41 frames")
    left.plot(*column("vae_decoder", "psnr"), label="then the decoder alone, new scenes")
    left.set(xlabel="minutes", ylabel="PSNR of the batch, dB", title="VAE")
    for key, label in (("first", "first block"), ("loss", "mean"), ("later", "blocks 3 to 6")):
        right.plot(*column("transformer", key), label=label)
    right.set(xlabel="minutes", ylabel="flow error", yscale="log", title="transformer")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
