"""Numbers of the track of a video, each against a slow or known one; streaming equals whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vbench_stubs import info
from vbench_stubs import scores as measured

from longtake.evaluation.backbones import classical_backbones
from longtake.evaluation.metrics import make_metrics
from longtake.evaluation.metrics.course import (
    SEAMS,
    Pooling,
    TrackMetric,
    _area_weights,
    _monotone_share,
    _spectral_slope,
    mean_difference,
)
from longtake.evaluation.metrics.motion import (
    REPETITION,
    STILLNESS,
    _explained_by_camera,
    _find_loop,
    _find_stillness,
    _moves,
    _repeats,
)


def scores(video, measure, **facts):
    return measured([TrackMetric([measure])], video, **{"fps": 16.0, **facts})


def track_of(video, fps=16.0):
    meter = TrackMetric([]).start(info(video, fps=fps))
    meter.push(video)
    return meter.track()


def noise(num_frames, height=40, width=56, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def wandering(num_frames, seed=0, size=48):
    """A bright square over a slope, on a path that does not close."""
    rng = np.random.default_rng(seed)
    speed = rng.uniform(0.6, 1.1, 2)
    frames = np.empty((num_frames, size, size, 3), dtype=np.uint8)
    frames[:] = np.linspace(40, 120, size)[None, :, None]
    for index in range(num_frames):
        y, x = (np.abs((speed * (index + 9)) % 64 - 32)).astype(int)
        frames[index, y : y + 14, x : x + 14] = (220, 180, 90)
    return frames


@pytest.mark.parametrize(("length", "cells"), [(64, 32), (7, 3), (5, 5), (100, 32), (33, 32)])
def test_area_weights_are_exact_shares(length, cells):
    weights = _area_weights(length, cells)
    fine = np.kron(np.eye(cells), np.ones((1, length))) @ np.kron(np.eye(length), np.ones((cells, 1))) / length
    assert np.allclose(weights, fine, atol=1e-6)
    picture = noise(1, 37, length)[0]
    expected = np.einsum("rh,hwc,kw->rkc", _area_weights(37, 8), picture, weights)
    assert np.allclose(Pooling(37, length, (8, cells))(picture), expected, atol=1e-3)


def test_track_holds_the_picture_its_changes_and_its_repetitions():
    video = noise(6)
    video[4] = video[1]
    track = track_of(video)
    assert track.luma.shape == (6, 10, 14) and track.colour.shape == (6, 8, 8, 3)
    assert np.allclose(track.colour.mean(axis=(1, 2)), video.mean(axis=(1, 2)), atol=0.1)
    assert np.allclose(track.luma.mean(axis=(1, 2)), video.mean(axis=(1, 2)) @ [0.299, 0.587, 0.114], atol=0.1)
    assert np.allclose(track.difference[1:], np.abs(np.diff(video.astype(int), axis=0)).mean(axis=(1, 2, 3)))
    assert track.is_duplicate.tolist() == [False, False, False, False, True, False]
    assert mean_difference(video[0], video[0]) == 0.0


@settings(deadline=None, derandomize=True, max_examples=12)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12))
def test_pieces_of_any_length_give_the_same_scores(lengths):
    video = np.concatenate([wandering(70, seed=3), noise(20, 48, 48)])
    metrics, skipped = make_metrics(classical_backbones(), groups=("weight_free",))
    assert not skipped
    facts = {"fps": 16.0, "chunk_starts": (0, 12, 24, 36)}
    whole = measured(metrics, video, **facts)
    assert whole == measured(metrics, video, np.cumsum(lengths), **facts)
    assert whole.keys() == {spec.name for metric in metrics for spec in metric.specs}


@pytest.mark.parametrize("num_frames", [1, 2, 3, 5, 9, 17, 33])
@pytest.mark.parametrize("size", [(2, 3), (16, 20)])
def test_short_and_tiny_videos_have_numbers_or_reasons(num_frames, size):
    video = noise(num_frames, *size)
    metrics, _ = make_metrics(classical_backbones(), groups=("weight_free", "judge"))
    found = measured(metrics, video, fps=16.0)
    assert found.keys() == {spec.name for metric in metrics for spec in metric.specs}
    for score in found.values():
        assert score.skipped or np.isfinite(score.value)
        assert all(window.value is None or np.isfinite(window.value) for window in score.windows)


@pytest.mark.parametrize("tail", [16, 25, 40])
def test_frozen_tail_is_measured_to_the_frame(tail):
    video = wandering(96)
    video[-tail:] = video[-tail]
    score = scores(video, STILLNESS)["proxy/frozen_tail_s"]
    assert score.value == pytest.approx(tail / 16, abs=1 / 16)
    assert score.details["start_s"] == pytest.approx((96 - tail) / 16, abs=1 / 16)


def test_slow_motion_is_no_stillness():
    """Half a pixel a second: nothing between neighbouring frames, plain after one second of a large picture."""
    rows = np.arange(256)[None, :] + 2.0 * np.arange(64)[:, None] / 16
    frames = np.broadcast_to((120 + 60 * np.sin(rows / 9.0))[:, :, None, None], (64, 256, 64, 3)).astype(np.uint8)
    assert _find_stillness(track_of(frames)).is_still[4:].mean() == 0.0


@pytest.mark.parametrize(("sigma", "camera"), [(0.0, 0.4), (2.0, 0.2)])
def test_camera_explains_its_own_change_and_not_grain(sigma, camera):
    rows, columns = np.mgrid[:32, :32] / 32.0
    rng = np.random.default_rng(0)

    def picture(shift, zoom=0.0):
        y, x = rows * (1 + zoom) + shift, columns * (1 + zoom) - shift
        waves = np.cos(9 * x + 4 * y) + np.sin(7 * y - 5 * x) + np.cos(19 * x)
        return 120 + 25 * waves + rng.normal(0, sigma, rows.shape)

    assert _explained_by_camera(picture(0.0), picture(0.01)) > camera
    assert _explained_by_camera(picture(0.0), picture(0.0, zoom=0.01)) > camera
    assert _moves(picture(0.0), picture(0.01))
    still = rng.normal(0, 1, (2, 32, 32)) * max(sigma, 1.0) + picture(0.0)
    assert _explained_by_camera(*still) < 0.05 and not _moves(*still)
    assert not _moves(still[0], still[1] + 20), "more light is no motion"
    still[1][5:9, 5:9] += 40
    assert _moves(*still)


def test_duplicates_count_earlier_frames_anywhere_and_a_static_video_has_nothing_else():
    video = wandering(40)
    video[30:35] = video[3:8]
    score = scores(video, STILLNESS)["proxy/duplicate_frames"]
    assert score.details["num_duplicates"] == 5 and score.value == pytest.approx(5 / 39)
    found = scores(np.repeat(noise(1), 32, axis=0), STILLNESS)
    assert {name: score.value for name, score in found.items()} == {
        "proxy/static_share": 1.0,
        "proxy/frozen_tail_s": 0.0,
        "proxy/duplicate_frames": 1.0,
    }


@pytest.mark.parametrize("period", [17, 32, 45])
def test_loop_has_its_period(period):
    video = wandering(150)
    assert _find_loop(track_of(video)) is None
    loop = _find_loop(track_of(video[np.arange(150) % period]))
    assert loop.period == period
    assert loop.end == 150 and loop.start <= 8


def test_repetitions_equal_the_slow_search():
    rng = np.random.default_rng(2)
    pictures = rng.normal(0, 1, (600, 12)).astype(np.float32).cumsum(axis=0)
    pictures[300:] = pictures[40:340]
    limits = rng.uniform(0.1, 30, 600)
    periods = range(5, 290)
    found = _repeats(pictures, limits, periods)
    slow = np.zeros_like(found)
    for row, period in enumerate(periods):
        apart = np.square(pictures[period:] - pictures[:-period]).mean(axis=1)
        slow[row, period:] = apart <= np.minimum(limits[period:], limits[:-period])
    assert (found != slow).mean() < 1e-5  # ties may round either way
    assert slow.any() and not slow.all()


def test_self_similarity_rises_with_repetition_and_return():
    video = wandering(200, seed=4)
    there_and_back = np.concatenate([video[:101], video[99::-1]])
    plain, mirrored = scores(video, REPETITION), scores(there_and_back, REPETITION)
    assert mirrored["proxy/return_to_start"].value > plain["proxy/return_to_start"].value + 0.1
    assert mirrored["proxy/return_to_start"].details["closest"] == pytest.approx(1.0, abs=0.02)
    assert mirrored["proxy/self_similarity_peak"].details["peak"] == pytest.approx(1.0, abs=0.02)
    assert mirrored["proxy/loop_share"].value == 0.0
    short = scores(video[:60], REPETITION)["proxy/self_similarity_peak"]
    assert short.value is None and "5 s" in short.skipped


def test_seam_ratio_is_what_it_says():
    video = wandering(48)
    starts = (0, 12, 30)
    change = np.abs(np.diff(video.astype(int), axis=0)).mean(axis=(1, 2, 3))
    at_seams = change[[11, 29]]
    elsewhere = np.delete(change, [11, 29])
    score = scores(video, SEAMS, chunk_starts=starts)["proxy/chunk_seam_ratio"]
    assert score.value == pytest.approx(at_seams.mean() / elsewhere.mean())
    assert score.details["seams"] == [[12, pytest.approx(at_seams[0])], [30, pytest.approx(at_seams[1])]]
    standing = np.repeat(noise(4, seed=5), 12, axis=0)
    jumps = scores(standing, SEAMS, chunk_starts=(0, 12, 24, 36))["proxy/chunk_seam_ratio"]
    assert np.isfinite(jumps.value) and jumps.value > 100
    assert scores(standing[:12], SEAMS, chunk_starts=(0,))["proxy/chunk_seam_ratio"].skipped


@pytest.mark.parametrize("slope", [-2.0, -1.0, 0.0])
def test_spectral_slope_of_known_spectra(slope):
    rng = np.random.default_rng(0)
    index = np.arange(32)
    phases = rng.uniform(0, 2 * np.pi, (17, 5))
    waves = np.cos(2 * np.pi * np.arange(1, 17)[:, None, None] * index[None, :, None] / 32 + phases[1:, None])
    # The highest frequency has one component where the others have two.
    amplitudes = 20.0 * np.arange(1.0, 17.0) ** slope
    waves[-1] = np.cos(np.pi * index)[:, None] * 0.5
    series = 100 + (amplitudes[:, None, None] * waves).sum(axis=0)
    assert _spectral_slope(series) == pytest.approx(slope, abs=1e-3)
    assert _spectral_slope(np.full((32, 3), 7.0)) is None


def test_monotone_share_equals_the_slow_fit():
    rng = np.random.default_rng(1)
    for _ in range(20):
        values = rng.normal(0, 1, 15) + np.linspace(0, rng.uniform(-2, 4), 15)
        slow = [
            max(min(values[first:last].mean() for last in range(index + 1, 16)) for first in range(index + 1))
            for index in range(15)
        ]
        left = np.square(values - slow).sum() / np.square(values - values.mean()).sum()
        assert _monotone_share(values) == pytest.approx(1 - left, abs=1e-9)
    assert _monotone_share(np.ones(4)) == 0.0
