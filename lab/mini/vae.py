"""Train the mini model's VAE: diffusers' AutoencoderKLWan on 2x2-patchified pixels, 8x spatial and 4x temporal."""

import itertools
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm, patchify, unpatchify
from torch import Tensor, nn
from torch.nn import functional

from lab.mini.optim import OptimiserPair, WeightAverage
from lab.mini.runtime import (
    StageLog,
    autocast,
    average_gradients,
    console,
    rank,
    save_atomically,
    shared_progress,
)
from lab.scenes import training_scene
from longtake.evaluation.mini_world.scenes import held_back_scenes, render
from longtake.models.wan import config_of

Z_DIM = 12
# (share of the budget at which the stage ends, frames per clip, clips per batch and worker)
STAGES = ((0.25, 1, 8), (0.55, 9, 2), (0.78, 17, 1), (1.01, 41, 1))
KL_WEIGHT = 1e-3
LEARNING_RATES = (4e-3, 2e-3)
DECODER_LEARNING_RATES = (1.5e-3, 1e-3)
DECODER_FRAMES = 41
CONFIG = {"base_dim": 32, "is_residual": False}


def build_vae(*, base_dim: int = 32, is_residual: bool = False) -> AutoencoderKLWan:
    """Return an initialised VAE; torch's default init of the kernels never leaves a grey picture."""
    vae = AutoencoderKLWan(
        base_dim=base_dim,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        z_dim=Z_DIM,
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        is_residual=is_residual,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
        latents_mean=[0.0] * Z_DIM,
        latents_std=[1.0] * Z_DIM,
    )
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            kernel: Any = module
            kernel.to(memory_format=torch.channels_last if isinstance(module, nn.Conv2d) else torch.channels_last_3d)
    return vae


def load_vae(work: Path) -> AutoencoderKLWan:
    """Return the averaged weights of the latest VAE stage in ``work``, in float32 on the CPU, ready for inference."""
    tuned = work / "vae_decoder.pt"
    saved = torch.load(tuned if tuned.exists() else work / "vae.pt", weights_only=True, map_location="cpu")
    vae = build_vae(**saved["config"])
    vae.load_state_dict(saved["average"])
    return vae.eval()


def _forward_frame(module: WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """A causal convolution of one frame without history: only the last temporal tap meets anything but zeros."""
    if x.shape[2] != 1 or cache_x is not None:
        return WanCausalConv3d.forward(module, x, cache_x)
    rows_and_columns: Any = (module._padding[2], module._padding[0])
    return functional.conv2d(x[:, :, 0], module.weight[:, :, -1], module.bias, padding=rows_and_columns).unsqueeze(2)


def _forward_norm(module: WanRMS_norm, x: Tensor) -> Tensor:
    """The channel norm with its statistics in float32 and its picture-sized tensors in the input's type."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    return x * (module.scale / norm.clamp_min(1e-12)).to(x.dtype) * module.gamma.to(x.dtype)


def quicken(vae: AutoencoderKLWan) -> None:
    """Give this instance's layers equivalent, cheaper forwards for training; saved weights are not concerned.

    Single frames skip the taps that only meet zeros, and norms stay in bfloat16 under autocast.
    """
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d) and module.stride == (1, 1, 1):
            module.forward = partial(_forward_frame, module)
        if isinstance(module, WanRMS_norm):
            module.forward = partial(_forward_norm, module)


def to_model(frames: np.ndarray) -> Tensor:
    """Turn (B, F, H, W, 3) uint8 into (B, 3, F, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(frames)).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1.0)


def _steps(num_frames: int, stride: int) -> list[tuple[int, int]]:
    """Ranges [0, 1), [1, 1 + stride), ... that cover the frames: the first one always stands alone."""
    return list(itertools.pairwise([0, *range(1, num_frames, stride), num_frames]))


def decode_stream(vae: AutoencoderKLWan, latents: Tensor, *, stride: int = 1) -> Iterator[Tensor]:
    """Decode ``stride`` latent frames at a time with the causal state kept outside the module; pixels are not clamped.

    Args:
        vae: The VAE.
        latents: (B, z, F, h, w), de-normalised.
        stride: Latent frames per step after the first; the result does not depend on it, long steps are faster.

    Yields:
        (B, 3, 1, H, W) for the first latent frame, then (B, 3, 4 * stride, H, W) and a shorter rest.
    """
    state = [None] * vae._cached_conv_counts["decoder"]
    x = vae.post_quant_conv(latents)
    for start, stop in _steps(latents.shape[2], stride):
        part = vae.decoder(x[:, :, start:stop], feat_cache=state, feat_idx=[0], first_chunk=start == 0)
        yield unpatchify(part, config_of(vae).patch_size)


def encode_stream(vae: AutoencoderKLWan, video: Tensor, *, stride: int = 80) -> Tensor:
    """Encode (B, 3, 1 + 4k, H, W) to the posterior's (mean, log variance), (B, 2z, 1 + k, h, w).

    ``stride``, a multiple of four pixel frames, is the length of a step after the first frame.
    """
    state = [None] * vae._cached_conv_counts["encoder"]
    x = patchify(video, config_of(vae).patch_size)
    steps = _steps(video.shape[2], stride)
    return vae.quant_conv(
        torch.cat([vae.encoder(x[:, :, a:b], feat_cache=state, feat_idx=[0]) for a, b in steps], dim=2)
    )


def render_clips(path: Path, *, count: int, num_frames: int) -> np.ndarray:
    """Return ``count`` training clips, (count, F, 64, 64, 3) uint8, rendered once into a memory-mapped file."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npy")
        clips = np.lib.format.open_memmap(partial, "w+", np.uint8, (count, num_frames, 64, 64, 3))
        for index in range(count):
            start = (index * 37) % 200
            clips[index] = render(training_scene(index), np.arange(start, start + num_frames))
        clips.flush()
        partial.replace(path)
    return np.load(path, mmap_mode="r")


def loss_on(
    vae: AutoencoderKLWan, video: Tensor, generator: torch.Generator, *, noise_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return (loss, mean squared error on [-1, 1]) of a batch (B, 3, F, H, W) with a sampled latent.

    ``noise_scale`` multiplies the posterior's standard deviation.
    """
    with torch.set_grad_enabled(vae.quant_conv.weight.requires_grad):
        mean, log_variance = encode_stream(vae, video).float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-12.0, 4.0)
    noise = noise_scale * torch.randn(mean.shape, generator=generator).to(mean.device)
    latents = mean + noise * (0.5 * log_variance).exp()
    decoded = torch.cat(list(decode_stream(vae, latents, stride=20)), dim=2).float()
    error = decoded - video
    squared = error.square().mean()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
    return error.abs().mean() + 4.0 * squared + KL_WEIGHT * divergence, squared.detach()


@torch.inference_mode()
def measure_psnr(vae: AutoencoderKLWan, *, num_clips: int, num_frames: int) -> dict[str, float]:
    """Return PSNR in dB on held-back scenes, streamed: of the mean error, mean over clips, worst clip, early, late."""
    errors = []
    device = next(vae.parameters()).device
    for scene in held_back_scenes(num_clips):
        video = to_model(render(scene, np.arange(num_frames))[None]).to(device)
        with autocast(device):
            mean = encode_stream(vae, video).float().chunk(2, dim=1)[0]
            decoded = torch.cat(list(decode_stream(vae, mean)), dim=2).float().clamp(-1.0, 1.0)
        errors.append(((decoded - video) / 2.0).square().mean(dim=(0, 1, 3, 4)))
    error = torch.stack(errors)
    third = max(1, num_frames // 4)
    picks = {"psnr": error.mean(), "early": error[:, :third].mean(), "late": error[:, -third:].mean()}
    result = {name: -10.0 * float(value.log10()) for name, value in picks.items()}
    per_clip = -10.0 * error.mean(dim=1).log10()
    return {**result, "clip_mean": float(per_clip.mean()), "clip_worst": float(per_clip.min())}


def _draw_batch(clips: np.ndarray, rng: np.random.Generator, progress: float) -> Tensor:
    _, length, batch = next(stage for stage in STAGES if progress < stage[0])
    rows = rng.integers(len(clips), size=batch)
    starts = rng.integers(clips.shape[1] - length + 1, size=batch)
    return to_model(np.stack([clips[row, start : start + length] for row, start in zip(rows, starts, strict=True)]))


def _draw_fresh(rng: np.random.Generator, batch: int) -> Tensor:
    frames = np.arange(DECODER_FRAMES)
    scenes = [training_scene(int(rng.integers(2**31))) for _ in range(batch)]
    return to_model(np.stack([render(scene, frames + int(rng.integers(200))) for scene in scenes]))


def _split_params(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split trainable parameters into kernels, for Muon, and everything else."""
    params = [p for p in module.parameters() if p.requires_grad]
    is_kernel = [p.ndim >= 4 and min(p.shape[0], p[0].numel()) > 1 for p in params]
    return (
        [p for p, chosen in zip(params, is_kernel, strict=True) if chosen],
        [p for p, chosen in zip(params, is_kernel, strict=True) if not chosen],
    )


def _decoder_of(work: Path) -> AutoencoderKLWan:
    """Load the trained VAE with its encoder frozen, so that every latent stays what it is."""
    vae = load_vae(work)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    return vae


def train_vae(work: Path, device: torch.device, *, minutes: float, decoder_only: bool = False) -> None:
    """Train (or resume) the VAE for ``minutes`` in all.

    Runs alone or as one of the workers of :func:`runtime.launch`, which share gradients.

    Args:
        work: Folder of checkpoints and logs.
        device: Where to train.
        minutes: Length of the whole stage, which clip lengths and learning rate follow.
        decoder_only: Keep the encoder, and with it every latent, and go on with the decoder on ever new scenes.
    """
    name = "vae_decoder" if decoder_only else "vae"
    checkpoint = work / f"{name}.pt"
    torch.manual_seed(0)
    vae = _decoder_of(work) if decoder_only else build_vae(**CONFIG)
    nn.Module.to(vae.train(), device)
    quicken(vae)
    clips = np.empty(0) if decoder_only else render_clips(work / "vae_clips.npy", count=1600, num_frames=81)
    optimiser = OptimiserPair(*_split_params(vae), lr=DECODER_LEARNING_RATES if decoder_only else LEARNING_RATES)
    average, step, spent = WeightAverage(vae), 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        vae.load_state_dict(saved["live"])
        average.values, step, spent = saved["average"], saved["step"], saved["seconds"]
        optimiser.load_state_dict(saved["optimiser"])
    log = StageLog(work / f"{name}.jsonl", 60.0 * minutes, spent_seconds=spent)
    rng = np.random.default_rng([step, rank(), decoder_only])
    generator = torch.Generator().manual_seed(1000 * step + rank())
    console.print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters, from step {step}")
    saved_at, squared_errors = log.spent, deque(maxlen=50)

    def save() -> None:
        state = {"live": vae.state_dict(), "average": average.values, "optimiser": optimiser.state_dict()}
        save_atomically({**state, "step": step, "seconds": log.spent, "config": CONFIG}, checkpoint)

    while (progress := shared_progress(log.advance())) < 1.0:
        video = _draw_fresh(rng, 1) if decoder_only else _draw_batch(clips, rng, progress)
        with autocast(device):
            loss, squared = loss_on(vae, video.to(device), generator, noise_scale=0.5 if decoder_only else 1.0)
        loss.backward()
        average_gradients(optimiser.params)
        norm = optimiser.step(min(1.0, (step + 1) / 50, (1.0 - progress) / 0.6 + 0.02))
        step += 1
        average.update(vae, min(0.99 if decoder_only else 0.998, 1.0 - 1.0 / (step + 1)))
        squared_errors.append(float(squared))
        if step % 50 == 0:
            psnr = -10.0 * float(np.log10(np.mean(squared_errors) / 4.0))
            log.write(step=step, frames=video.shape[2], loss=float(loss.detach()), psnr=psnr, norm=norm)
        if rank() == 0 and log.spent - saved_at > 120.0:
            save()
            saved_at = log.spent
    if rank() == 0:
        save()
