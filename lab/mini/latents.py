"""Encode the moving-scenes training set once: normalised float16 latents in a memory-mapped file, plus captions."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import nn

from lab.mini.runtime import StageLog, autocast, num_workers, rank
from lab.mini.vae import Z_DIM, encode_stream, load_vae, quicken, to_model
from lab.scenes import training_scene
from longtake.evaluation.mini_world.scenes import describe, render

NUM_FRAMES = 81
LATENT_SHAPE = (Z_DIM, 21, 8, 8)
FIRST_SCENE = 100_000  # scenes below were the VAE's


def measure_latents(vae: AutoencoderKLWan, device: torch.device, *, num_clips: int = 48) -> tuple[list, list]:
    """Return the mean and standard deviation of every latent channel over training clips."""
    means = []
    for index in range(num_clips):
        video = to_model(render(training_scene(FIRST_SCENE + index), np.arange(NUM_FRAMES))[None]).to(device)
        with torch.inference_mode(), autocast(device):
            means.append(encode_stream(vae, video).float().chunk(2, dim=1)[0].cpu())
    stacked = torch.cat(means).transpose(0, 1).flatten(1)
    return stacked.mean(dim=1).tolist(), stacked.std(dim=1).tolist()


def encode_latents(work: Path, device: torch.device, *, clips: int, batch: int = 2) -> None:
    """Encode ``clips`` training clips to ``latents.npy``, (clips, z, 21, 8, 8); resumes where it stopped.

    Each worker writes every n-th batch. The statistics go to ``latents.json``, the captions to ``captions.json``.
    """
    vae = load_vae(work)
    nn.Module.to(vae, device)
    quicken(vae)
    path, done_path, statistics_path = work / "latents.npy", work / f"latents.{rank()}.done", work / "latents.json"
    if rank() == 0 and not statistics_path.exists():
        mean, std = measure_latents(vae, device)
        np.lib.format.open_memmap(path, "w+", np.float16, (clips, *LATENT_SHAPE)).flush()
        captions = [describe(training_scene(FIRST_SCENE + index)) for index in range(clips)]
        (work / "captions.json").write_text(json.dumps(captions))
        statistics_path.write_text(json.dumps({"mean": mean, "std": std, "clips": clips}))
    if num_workers() > 1:
        torch.distributed.barrier()
    statistics = json.loads(statistics_path.read_text())
    mean, std = (torch.tensor(statistics[key]).view(1, -1, 1, 1, 1) for key in ("mean", "std"))
    latents = np.load(path, mmap_mode="r+")
    first = int(done_path.read_text()) if done_path.exists() else rank() * batch
    log = StageLog(work / "encode.jsonl", 600.0)
    for start in range(first, clips, batch * num_workers()):
        stop = min(start + batch, clips)
        frames = [render(training_scene(FIRST_SCENE + index), np.arange(NUM_FRAMES)) for index in range(start, stop)]
        with torch.inference_mode(), autocast(device):
            encoded = encode_stream(vae, to_model(np.stack(frames)).to(device)).float().chunk(2, dim=1)[0].cpu()
        latents[start:stop] = ((encoded - mean) / std).half().numpy()
        if (start // batch // num_workers()) % 50 == 49:
            latents.flush()
            done_path.write_text(str(start + batch * num_workers()))
            log.advance()
            log.write(clips=stop, of=clips)
    latents.flush()
    done_path.write_text(str(clips))
