"""The compressor's training: it reads history as a rollout does, learns, and goes on where it stopped."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from lab.mini import compressor
from lab.mini.compressor import Distillation, Forward, Lessons, Reader, Task, causal_mask
from longtake.cache.policies.pack import LatentCompressor, load_compressor
from longtake.models import VaePixels
from longtake.pipelines import LatentRollout, LongVideoPipeline

GRID, FRAMES = (4, 4), 3


@pytest.fixture(scope="module")
def pipe():
    pipe = LongVideoPipeline.from_pretrained("mini")
    pipe.transformer.eval().requires_grad_(False)
    return pipe


@torch.no_grad()
def test_training_reads_what_a_rollout_reads(pipe, tmp_path, monkeypatch):
    """Blocks 0 to 3: a sink, a compressed block, a recent one, and the one that is denoised."""
    monkeypatch.setattr(compressor, "autocast", lambda device: nullcontext())
    generator = torch.Generator().manual_seed(3)
    network = LatentCompressor(12, 192, (4, 6, 8, 8))
    torch.nn.init.normal_(network.projection.weight, std=0.3, generator=generator)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    latents, noise = torch.randn(1, 12, 12, 8, 8, generator=generator).split([9, 3], dim=1)
    prompt, pixels = pipe.embed_text(["a red circle over a navy background"]), VaePixels(pipe.vae)
    rollout = LatentRollout(
        pipe.transformer,
        prompt,
        num_frames=FRAMES,
        frame_shape=(12, 8, 8),
        initial_latents=latents,
        cache={
            "policy": "pack",
            "num_sink_frames": 3,
            "num_recent_frames": 3,
            "compressor": "hr+lr",
            "compressor_weights": str(tmp_path / "w.safetensors"),
        },
        sampler={"name": "few_step", "timesteps": [1000]},
        noise=SimpleNamespace(initial=lambda block_index, start_frame, shape: noise),
        pixels=pixels,
    )
    rolled = noise - rollout.next_block().latents

    blocks = latents.unflatten(1, (3, FRAMES))
    pooled = pixels.pool(blocks.flatten(0, 1), (2, 2, 2)).unflatten(0, (1, 3))
    errors = {}
    with Reader(pipe.transformer, GRID).installed() as reader:
        phases = reader.phases([0.0, 3.0, 6.0], (FRAMES, *GRID), FRAMES)
        clean = Forward(phases, mask=causal_mask(3, 48))
        reader.flow(latents, 0.0, prompt, clean)
        for kind in ("hr+lr", "hr", "lr"):
            distillation = Distillation(reader, FRAMES, kind, network if "hr" in kind else None)
            context = distillation._packed(Task(3, 1), latents, pooled, prompt, clean.made)
            own = Forward(reader.phases([9.0], (FRAMES, *GRID), FRAMES), context=context)
            errors[kind] = (reader.flow(noise, 1000.0, prompt, own) - rolled).abs().max().item()
    assert errors["hr+lr"] < 1e-3 and min(errors["hr"], errors["lr"]) > 5e-3, errors


def test_it_learns_and_goes_on(pipe, tmp_path, monkeypatch, one_second_a_step):
    monkeypatch.setattr(compressor, "NUM_VALIDATION", 1)
    monkeypatch.setattr(compressor, "CHANNELS", (4, 6, 8, 8))
    generator = torch.Generator().manual_seed(4)
    lessons = Lessons(
        torch.randn(3, 15, 12, 8, 8, generator=generator),
        torch.randn(3, 5, 1, 12, 4, 4, generator=generator),
        pipe.embed_text(["a red circle", "a blue star", "a white square"]),
    )
    with Reader(pipe.transformer, GRID).installed() as reader:
        lessons.fill(reader, FRAMES)
        assert lessons.full[0][0].shape == (2, 4 * 48, 6, 32) and set(lessons.wanted) == {3, 4}
        network = LatentCompressor(12, 192, compressor.CHANNELS)
        distillation = Distillation(reader, FRAMES, "hr", network)
        optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
        losses = []
        for _ in range(6):
            loss = distillation.loss(Task(4, 1), lessons, torch.tensor([0, 1]))
            losses.append(loss.item())
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        assert losses[-1] < losses[0]
        options = {"kind": "hr", "frames_per_block": FRAMES, "batch": 1}
        compressor.train_compressor(tmp_path, reader, lessons, minutes=3 / 60, **options)
        first = torch.load(tmp_path / "hr.pt", weights_only=True)
        again = compressor.train_compressor(tmp_path, reader, lessons, minutes=5 / 60, **options)
        second = torch.load(tmp_path / "hr.pt", weights_only=True)
    assert (first["step"], first["seconds"], second["step"], second["seconds"]) == (2, 3.0, 3, 5.0)
    compressor.save_compressor(again, tmp_path / "out" / "hr.safetensors")
    assert load_compressor(str(tmp_path / "out" / "hr.safetensors"), "hr", torch.device("cpu")).projection.weight.any()
