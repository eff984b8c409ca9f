"""Statistics of single frames against slow or known values, and their drift."""

import math

import numpy as np
import pytest
from vbench_stubs import info, scores

from longtake.evaluation.metrics import stills
from longtake.evaluation.metrics.course import LUMA_WEIGHTS
from longtake.evaluation.metrics.stills import STATISTICS, StillMeter, StillsMetric, _blockiness, _shrink, _texture

RNG = np.random.default_rng(0)


def values(frame):
    colour = _shrink(frame, 1)
    names = [spec.name.removeprefix("proxy/") for spec in STATISTICS]
    found = stills._statistics(frame, colour, np.tensordot(LUMA_WEIGHTS, colour, axes=1))
    return dict(zip(names, found, strict=True))


def measured(video, name, fps=16.0):
    return scores([StillsMetric()], video, range(7, len(video), 7), fps=fps)[f"proxy/{name}"]


def blurred(video, times):
    video = video.astype(float)
    for _ in range(times):
        video = (video + np.roll(video, 1, 1) + np.roll(video, 1, 2) + np.roll(video, (1, 1), (1, 2))) / 4
    return video


@pytest.fixture(scope="module")
def textured():
    frames = blurred(RNG.uniform(0, 255, (1, 96, 96, 3)), 1)[0]
    return np.stack([np.roll(frames, shift, axis=1) for shift in range(160)]).round().astype(np.uint8)


def test_frames_are_averaged_down_by_a_whole_factor():
    frame = RNG.integers(0, 256, (50, 41, 3), dtype=np.uint8)
    slow = frame[:48, :39].reshape(16, 3, 13, 3, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    assert np.allclose(_shrink(frame, 3), slow, atol=1e-4)
    assert np.array_equal(_shrink(frame, 1), frame.transpose(2, 0, 1))
    for side, factor in ((64, 1), (380, 1), (480, 2), (720, 3), (1080, 4)):
        assert StillsMetric().start(info(np.empty((1, side, 2 * side, 3)))).factor == factor


def test_texture_equals_the_slow_convolution_and_finds_grain_on_slopes():
    luma = RNG.uniform(0, 255, (20, 31)).astype(np.float32)
    laplace = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    immerkaer = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])

    def slow(kernel):
        return sum(kernel[i, j] * luma[i : i + 18, j : j + 29].astype(float) for i in range(3) for j in range(3))

    sharpness, noise = _texture(luma)
    assert sharpness == pytest.approx(slow(laplace).var(), rel=1e-4)
    assert noise == pytest.approx(np.abs(slow(immerkaer)).mean() * math.sqrt(math.pi / 2) / 6, rel=1e-4)
    rows, columns = np.mgrid[:200, :200]
    for sigma in (2.0, 8.0):
        luma = 60 + 0.3 * rows + 0.2 * columns + np.random.default_rng(1).normal(0, sigma, (200, 200))
        assert _texture(luma.astype(np.float32))[1] == pytest.approx(sigma, rel=0.03)


def test_colorfulness_of_known_pictures():
    grey = np.full((3, 4, 4), 90.0, dtype=np.float32)
    assert stills._colorfulness(grey) == 0.0
    red = np.zeros((3, 4, 4), dtype=np.float32)
    red[0] = 200
    assert stills._colorfulness(red) == pytest.approx(0.3 * math.hypot(200, 100))
    halves = red.copy()
    halves[0, :2], halves[1, :2] = 0, 200
    assert stills._colorfulness(halves) == pytest.approx(200 + 0.3 * 100)


def test_blockiness_sees_borders_of_eight_only():
    smooth = np.broadcast_to(np.linspace(0, 200, 64)[None, :, None], (64, 64, 3)).astype(np.uint8)
    assert _blockiness(smooth) == pytest.approx(1.0, abs=0.1)
    blocks = RNG.integers(60, 200, (8, 8, 1)).repeat(8, 0).repeat(8, 1).repeat(3, 2).astype(np.uint8)
    assert _blockiness(blocks) > 50
    assert _blockiness(np.roll(blocks, 4, axis=(0, 1))) < 0.1
    assert _blockiness(np.full((8, 8, 3), 9, dtype=np.uint8)) == 1.0


def test_statistics_of_a_known_frame():
    frame = np.zeros((32, 32, 3), dtype=np.uint8)
    frame[:, :16] = (200, 100, 100)
    found = values(frame)
    light = 0.299 * 200 + 0.701 * 100
    assert found["exposure"] == pytest.approx(light / 2, rel=1e-5)
    assert found["contrast"] == pytest.approx(light / 2, rel=1e-5)
    assert found["saturation"] == pytest.approx(0.25, rel=1e-5)
    assert found["clipped_fraction"] == pytest.approx(0.5)
    greys = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert values(greys)["clipped_fraction"] == pytest.approx(4 / 256)
    assert all(spec.higher_is_better is None for spec in STATISTICS)


def test_only_eight_frames_a_second_are_looked_at(textured):
    class Recorder(StillMeter):
        short_side = 256
        seen = ()

        def take(self, index, frame, colour):
            self.seen = (*self.seen, index)

        def finish(self):
            return {}

    meter = Recorder(info(textured[:30], fps=24.0))
    for piece in np.split(textured[:30], range(7, 30, 7)):
        meter.push(piece)
    assert meter.seen == tuple(range(0, 30, 3))


def test_sharpness_drift_follows_blur_only(textured):
    steady = measured(textured, "sharpness_drift")
    assert steady.value < 0.02 and steady.details["compared_s"] == 5.0
    softer = textured.copy()
    softer[80:] = blurred(softer[80:], 2).round().astype(np.uint8)
    drift = measured(softer, "sharpness_drift")
    assert drift.value > 1.0 and drift.details["change"] < -1.0
    assert drift.windows[0].value < 0.05 < 1.0 < drift.windows[-1].value
    lighter = (textured * 0.5 + 100).round().astype(np.uint8)
    mixed = np.concatenate([textured[:80] * 0.5 + 60, lighter[80:]]).round().astype(np.uint8)
    assert measured(mixed, "sharpness_drift").value < 0.05


@pytest.mark.parametrize(("shape", "draw"), [(1.0, "laplace"), (2.0, "normal")])
def test_generalised_gaussians_are_recovered(shape, draw):
    samples = getattr(np.random.default_rng(3), draw)(0, 3.0, (256, 256)).astype(np.float32)
    found, deviation = stills._symmetric(samples, (1, 1))
    assert found.item() == pytest.approx(shape, rel=0.05)
    assert deviation.item() == pytest.approx(samples.std(), rel=0.01)
    # Halves of the same shape; the wider one also has more of the mass.
    is_left = np.random.default_rng(4).uniform(size=samples.shape) < 0.2
    skewed = np.where(is_left, -0.5, 2.0).astype(np.float32) * np.abs(samples)
    found, mean, left, right = (value.item() for value in stills._asymmetric(skewed, (1, 1)))
    assert found == pytest.approx(shape, rel=0.08)
    assert right / left == pytest.approx(4.0, rel=0.05)
    assert mean == pytest.approx(skewed.mean(), rel=0.05)


def test_normalised_brightness_equals_the_slow_one():
    luma = RNG.uniform(0, 255, (17, 20)).astype(np.float32)
    taps = np.exp(-0.5 * (np.arange(-3, 4) / stills.SIGMA) ** 2)
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    found = stills._normalised(luma)
    for row, column in ((0, 0), (5, 7), (10, 13)):
        window = luma[row : row + 7, column : column + 7].astype(float)
        mean = (kernel * window).sum()
        deviation = math.sqrt((kernel * window**2).sum() - mean**2)
        assert found[row, column] == pytest.approx((luma[row + 3, column + 3] - mean) / (deviation + 1), abs=1e-3)


def test_nss_drift_ignores_motion_and_light_and_sees_blur_and_grain(textured):
    def drift(video):
        return measured(video.clip(0, 255).round().astype(np.uint8), "nss_drift_self")

    half = np.arange(160)[:, None, None, None] >= 80
    steady = drift(textured).value
    assert steady < 0.3
    assert "16 pixels" in drift(textured[:20, :12].astype(float)).skipped
    assert drift(np.repeat(textured[:1], 160, axis=0)).value == pytest.approx(0.0, abs=1e-6)
    assert drift(np.where(half, textured * 0.8 + 20, textured)).value < 0.5
    assert drift(np.where(half, blurred(textured, 2), textured)).value > 2.0
    grain = np.random.default_rng(5).normal(0, 25, textured.shape)
    grainy = drift(np.where(half, textured + grain, textured))
    assert grainy.value > 1.0
    assert grainy.windows[0].value < 0.5 < 1.0 < grainy.windows[-1].value
