"""Latents by way of pixels: scale, and pooling."""

import pytest
import torch
from torch.nn import functional

from longtake.models import VaePixels


@pytest.fixture
def pixels(tiny_pipe):
    return VaePixels(tiny_pipe.vae)


def latents(pixels, frames, height=8, width=12, batch=1):
    shape = (batch, frames, pixels.vae.config.z_dim, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(frames))


def test_normalise_undoes_denormalise(pixels):
    x = latents(pixels, 3)
    assert (pixels.normalise(pixels.denormalise(x)) - x).abs().max() < 1e-5


@pytest.mark.parametrize(("frames", "pooled"), [(4, 2), (3, 1), (1, 1), (6, 3)])
def test_pooling_by_hand(pixels, frames, pooled):
    """Stock decode, cell means of the pixels, evenly spaced spans of the frames, stock encode."""
    x = latents(pixels, frames)
    small = pixels.pool(x, (2, 4, 4))
    assert small.shape == (1, pooled, x.shape[2], 2, 3)
    with torch.no_grad():
        video = pixels.vae.decode(pixels.denormalise(x)).sample
        assert video.shape[2] == 1 + 4 * (frames - 1)
        cells = functional.avg_pool3d(video, (1, 4, 4))
        count, length = 1 + 4 * (pooled - 1), video.shape[2]
        spans = [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]
        clip = torch.stack([cells[:, :, start:end].mean(2) for start, end in spans], 2)
        z = pixels.vae.encode(clip).latent_dist.mode()
    assert (small - pixels.normalise(z)).abs().max() < 1e-4


def test_samples_do_not_touch_each_other(pixels):
    x = latents(pixels, 4, batch=2)
    both = pixels.pool(x, (2, 4, 4))
    assert (both[1:] - pixels.pool(x[1:], (2, 4, 4))).abs().max() < 1e-5


def test_cells_larger_than_the_video_are_refused(pixels):
    with pytest.raises(ValueError, match="less than the VAE's 8x8"):
        pixels.pool(latents(pixels, 4, 2, 2), (2, 4, 4))
