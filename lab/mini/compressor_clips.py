"""Clips for the compressor: latents of five seconds, each block of them pooled by way of pixels, and its caption."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from lab.mini.runtime import StageLog, autocast
from lab.mini.vae import encode_stream, to_model
from lab.scenes import training_scene
from longtake.cache.policies.pack import cell_factors
from longtake.evaluation.mini_world.scenes import describe, render
from longtake.models import VaePixels

NUM_FRAMES = 81
CELL = (2, 4, 4)  # pack's default
# Scenes of the mini model's training start at 0 and 100,000; these were not seen in it.
FIRST_SCENE = 300_000


def encode_clips(
    path: Path, vae: AutoencoderKLWan, *, clips: int, frames_per_block: int, tokens: tuple[int, int], batch: int = 8
) -> None:
    """Encode ``clips`` new training scenes to ``path``, a torch file; continues where it stopped.

    Args:
        path: Holds ``latents`` (clips, frames, channels, height, width) and ``pooled`` (clips, blocks, frames of a
            pooled block, channels, rows, columns), both normalised float16, and ``captions``.
        vae: Frozen.
        clips: How many in all.
        frames_per_block: Latent frames of a block.
        tokens: Token rows and columns of a frame.
        batch: Clips encoded together.
    """
    vae = vae.float().eval().requires_grad_(False)
    pixels = VaePixels(vae)
    factors = cell_factors((frames_per_block, *tokens), CELL)
    saved = torch.load(path, weights_only=True) if path.exists() else {"latents": [], "pooled": [], "captions": "[]"}
    latents, pooled, captions = list(saved["latents"]), list(saved["pooled"]), json.loads(saved["captions"])
    log = StageLog(path.with_suffix(".jsonl"), 60.0)
    while len(captions) < clips:
        indices = range(FIRST_SCENE + len(captions), FIRST_SCENE + min(len(captions) + batch, clips))
        scenes = [training_scene(index) for index in indices]
        encoded, small = _encode(
            pixels, np.stack([render(s, np.arange(NUM_FRAMES)) for s in scenes]), factors, frames_per_block
        )
        latents += encoded.half()
        pooled += small.half()
        captions += [describe(scene) for scene in scenes]
        log.advance()
        if len(captions) % (8 * batch) == 0 or len(captions) == clips:
            state = {"latents": torch.stack(latents), "pooled": torch.stack(pooled), "captions": json.dumps(captions)}
            torch.save(state, path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
            log.write(clips=len(captions), of=clips)


@torch.no_grad()
def _encode(pixels: VaePixels, frames: np.ndarray, factors: tuple[int, int, int], size: int) -> tuple[Tensor, Tensor]:
    """Latents of clips, and of every block decoded by itself and pooled, as a rollout does it."""
    video = to_model(frames)
    with autocast(video.device):
        encoded = pixels.normalise(encode_stream(pixels.vae, video).float().chunk(2, dim=1)[0])
        blocks = encoded.unfold(1, size, size).movedim(-1, 2)  # (batch, blocks, frames, channels, height, width)
        small = pixels.pool(blocks.flatten(0, 1), factors)
    return encoded, small.float().unflatten(0, blocks.shape[:2])
