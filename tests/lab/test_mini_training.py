"""The pieces of the mini model's training, on random latents of the right shape."""

import json

import numpy as np
import pytest
import torch

from lab.mini import runtime
from lab.mini.latents import LATENT_SHAPE
from lab.mini.optim import Muon, orthogonalise
from lab.mini.runtime import StageLog
from lab.mini.text import build_tokenizer, tokenize
from lab.mini.transformer import ClipSource, MiniModel, average_decay, draw_sigmas, rate_factor, train_transformer
from lab.mini.vae import build_vae, decode_stream, encode_stream, quicken
from lab.scenes import training_scene
from longtake.evaluation.mini_world.scenes import describe, held_back_scenes


def test_muon_flattens_the_spectrum_and_fits_a_kernel():
    for shape in ((12, 40), (40, 12)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(orthogonalise(matrix).float())
        assert values.min() > 0.5 and values.max() < 1.4
    torch.manual_seed(0)
    target, x = torch.nn.Conv2d(3, 4, 3), torch.randn(8, 3, 8, 8)
    layer = torch.nn.Conv2d(3, 4, 3)
    optimiser = Muon([layer.weight], lr=0.05)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target(x).detach()).square().mean()
        loss.backward()
        optimiser.step()
        layer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_clock_does_not_count_a_suspension(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(runtime.time, "monotonic", lambda: now[0])
    log = StageLog(tmp_path / "log.jsonl", 100.0, spent_seconds=20.0)
    now[0] += 5.0
    assert log.advance() == pytest.approx(0.25)
    now[0] += 3600.0
    assert log.advance() == pytest.approx(0.25 + runtime.LONGEST_STEP / 100.0)
    log.write(step=1, loss=0.5)
    assert json.loads(log.path.read_text())["loss"] == 0.5


def test_every_caption_word_is_one_token():
    tokenizer = build_tokenizer()
    captions = [describe(scene) for scene in [*held_back_scenes(50), *map(training_scene, range(50))]]
    ids, mask = tokenize(tokenizer, captions)
    assert ids.shape == mask.shape == (100, 32)
    for caption, length in zip(captions, mask.sum(dim=1), strict=True):
        assert length == len(caption.split()) + 1
    assert tokenizer.unk_token_id not in ids


def test_noise_levels_and_schedules():
    sigmas = draw_sigmas((4000, 2), torch.Generator().manual_seed(0))
    assert sigmas.min() >= 0.0 and sigmas.max() <= 1.0
    assert 0.6 < sigmas.mean() < 0.66  # 0.61 after a shift of 2, 0.73 on the sampler's own levels
    assert rate_factor(0, 0.0) < rate_factor(99, 0.01) == 1.0
    assert rate_factor(5000, 1.0) == pytest.approx(0.02)
    assert [average_decay(*at) for at in ((0, 0.0), (10_000, 0.5), (10_000, 0.95))] == [0.0, 0.998, 0.99]


@torch.no_grad()
def test_quicker_forwards_and_longer_steps_change_nothing():
    torch.manual_seed(0)
    vae = build_vae().eval()
    video = torch.rand(1, 3, 9, 32, 32) * 2.0 - 1.0
    stock = vae.encode(video).latent_dist
    decoded = torch.cat(list(decode_stream(vae, stock.mean)), dim=2)
    assert torch.allclose(decoded.clamp(-1.0, 1.0), vae.decode(stock.mean).sample, atol=1e-5)
    quicken(vae)
    assert torch.allclose(encode_stream(vae, video).chunk(2, dim=1)[0], stock.mean, atol=1e-4)
    quick = torch.cat(list(decode_stream(vae, stock.mean, stride=5)), dim=2)
    assert torch.allclose(quick, decoded, atol=1e-4)
    assert torch.allclose(encode_stream(vae, video[:, :, :1]), encode_stream(vae, video)[:, :, :1], atol=1e-4)


def _write_clips(folder, count: int) -> None:
    latents = np.random.default_rng(0).standard_normal((count, *LATENT_SHAPE)).astype(np.float16)
    np.save(folder / "latents.npy", latents)
    (folder / "captions.json").write_text(json.dumps([describe(training_scene(index)) for index in range(count)]))


def test_prompts_are_dropped_now_and_then(tmp_path):
    _write_clips(tmp_path, 4)
    source = ClipSource(tmp_path, seed=0)
    lengths = torch.cat([source.draw(8, torch.device("cpu"))[1][1].sum(dim=1) for _ in range(30)])
    assert 0.02 < float((lengths == 1).float().mean()) < 0.25


def test_training_resumes_from_its_checkpoint(tmp_path, one_second_a_step):
    _write_clips(tmp_path, 4)
    states = []
    for minutes in (2 / 60, 4 / 60):
        train_transformer(tmp_path, torch.device("cpu"), minutes=minutes, batch=1)
        states.append(torch.load(tmp_path / "transformer.pt", weights_only=True))
    assert [(state["step"], state["seconds"]) for state in states] == [(1, 2.0), (2, 4.0)]
    for before, after in zip((MiniModel().state_dict(), states[0]["live"]), (s["live"] for s in states), strict=True):
        assert any(not torch.equal(before[name], value) for name, value in after.items())
