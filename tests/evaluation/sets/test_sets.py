"""Set measures against slow versions written from their definitions; identical, shifted and collapsed sets."""

import json

import numpy as np
import pytest
import torch
from clips import write_clip
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.evaluation.backbones import classical_backbones
from longtake.evaluation.metric import VideoInfo
from longtake.evaluation.sets import (
    FeatureCollector,
    _frechet,
    _histogram_agreement,
    _prdc,
    _spectrum,
    _stream,
    measure_sets,
    set_scores,
)
from longtake.scripts.console import run_app
from longtake.scripts.main import app


def _features(seed, num=60, dims=8, shift=0.0, scale=1.0):
    return shift + scale * np.random.default_rng(seed).normal(size=(num, dims))


# Frechet


def _frechet_by_eigenvalues(x, y):
    """The product's eigenvalues are real and not negative, so its root's trace is the sum of their roots."""
    means, covariances = [a.mean(axis=0) for a in (x, y)], [np.cov(a, rowvar=False) for a in (x, y)]
    root = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum()
    return ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1]) - 2 * root


def test_frechet_against_eigenvalues_of_the_product():
    x, y = _features(0) @ _features(1, 8, 8), _features(2, 50, shift=0.3)
    expected = _frechet_by_eigenvalues(x, y)
    assert _frechet(x, y) == pytest.approx(expected, rel=1e-9)
    assert _frechet(y, x) == pytest.approx(expected, rel=1e-9)
    assert _frechet(x, x) == pytest.approx(0.0, abs=1e-9)
    assert _frechet(x + 0.5, x) == pytest.approx(8 * 0.25, rel=1e-9)


def test_frechet_of_singular_covariances_is_exact():
    x = _features(4, num=20, dims=200)
    assert _frechet(x, x, allow_small=True) == pytest.approx(0.0, abs=1e-10)
    assert _frechet(x, x + 0.1, allow_small=True) == pytest.approx(200 * 0.01, rel=1e-9)


def test_small_sets_are_refused_because_their_distance_is_biased():
    x, y = _features(5, num=30, dims=40), _features(6, num=30, dims=40)
    with pytest.raises(ValueError, match="30 and 30 videos are too small for 40 dimensions"):
        _frechet(x, y)
    large = [_features(seed, num=4000, dims=40) for seed in (7, 8)]
    assert _frechet(x, y, allow_small=True) > 20 * _frechet(*large)
    with pytest.raises(ValueError, match="too small"):
        _frechet(x[:1], y, allow_small=True)
    with pytest.raises(ValueError, match="equal dimensions"):
        _frechet(x, _features(0, dims=5))
    with pytest.raises(ValueError, match="NaN"):
        _prdc(np.full((9, 40), np.nan), x)
    with pytest.raises(ValueError, match="num_neighbours=5 in a set of 5 videos"):
        _prdc(x[:5], y)


# Precision, recall, density, coverage


def _prdc_by_loops(features, reference, k):
    def distance(a, b):
        return float(np.sqrt(((a - b) ** 2).sum()))

    def radius(points, i):
        return sorted(distance(points[i], p) for j, p in enumerate(points) if j != i)[k - 1]

    own = [radius(features, i) for i in range(len(features))]
    other = [radius(reference, i) for i in range(len(reference))]
    inside = [[distance(x, y) < other[j] for j, y in enumerate(reference)] for x in features]
    return (
        np.mean([any(row) for row in inside]),
        np.mean([any(distance(x, y) < own[i] for i, x in enumerate(features)) for y in reference]),
        np.mean([sum(row) for row in inside]) / k,
        np.mean([any(row[j] for row in inside) for j in range(len(reference))]),
    )


@given(st.integers(0, 1000), st.floats(0.0, 3.0), st.floats(0.1, 3.0), st.integers(1, 6))
@settings(deadline=None, derandomize=True, max_examples=25)
def test_prdc_is_what_loops_over_pairs_give(seed, shift, scale, k):
    x, y = _features(seed, 14, 3, shift, scale), _features(seed + 1, 11, 3)
    result = _prdc(x, y, num_neighbours=k)
    expected = _prdc_by_loops(x, y, k)
    assert tuple(result.values()) == pytest.approx(expected)


def test_identical_far_and_collapsed_sets():
    x = _features(9, 700, 4)  # more than are handled at once
    assert set(_prdc(x, x).values()) == {1.0} and set(_prdc(x + 100.0, x).values()) == {0.0}
    narrow = _prdc(0.05 * x, x)
    assert narrow["precision"] == 1.0 and narrow["recall"] < 0.1


# STREAM


def _spectrum_by_sums(features):
    """The transform and the fit written out for one channel at a time."""
    frames, dims = features.shape
    half = frames // 2
    means, skews = [], []
    for d in range(dims):
        amplitudes = [
            2 / (1 + half) * abs(sum(features[t, d] * np.exp(-2j * np.pi * k * t / frames) for t in range(frames)))
            for k in range(half + 1)
        ]
        k = np.arange(1, half + 1)
        slope, intercept = np.polyfit(np.log(k), np.log(np.array(amplitudes[1:]) + 1e-6), 1)
        factor = np.exp(intercept)
        share = factor / (factor * k**slope).sum()
        skews.append((k ** (slope + 3)).sum() / (np.sqrt(share) * np.sqrt((k ** (slope + 2)).sum())))
        means.append(amplitudes[0])
    return np.array(means), np.array(skews)


def test_spectrum_is_what_sums_give():
    features = _features(10, 16, 5).cumsum(axis=0)
    means, skews = _spectrum_by_sums(features)
    mean, skewness = _spectrum(features)
    assert mean == pytest.approx(means, rel=1e-9)
    assert skewness == pytest.approx(skews, rel=1e-7)
    assert np.isfinite(_spectrum(np.ones((16, 5)))[1]).all()
    for frames in (2, 15):
        with pytest.raises(ValueError, match="even number of frames"):
            _spectrum(np.zeros((frames, 3)))


def _videos(seed, num=40, frames=16, dims=6, *, noise=1.0, level=0.0):
    rng = np.random.default_rng(seed)
    walk = noise * rng.normal(size=(num, frames, dims)).cumsum(axis=1)
    return level + 3 * rng.normal(size=(num, 1, dims)) + walk


def test_stream_sees_what_changed_and_only_that():
    reference = _videos(11)

    def stream(videos):
        return tuple(_stream(videos, reference).values())

    assert stream(reference) == (pytest.approx(1.0), 1.0, 1.0)
    shuffled = np.stack([np.random.default_rng(i).permutation(video) for i, video in enumerate(reference)])
    temporal, *spatial = stream(shuffled)
    assert temporal < 0.5 and spatial == [1.0, 1.0]
    temporal, *spatial = stream(_videos(11, level=40.0))
    assert temporal > 0.95 and spatial == [0.0, 0.0]
    _, fidelity, diversity = stream(np.repeat(reference[:2], 20, axis=0) + 0.01 * _videos(12))
    assert diversity < 0.3 < 0.9 < fidelity
    with pytest.raises(ValueError, match="equal"):
        stream(_videos(0, frames=18))


def test_histograms_share_their_range():
    rng = np.random.default_rng(13)
    x, y = rng.normal(5, 1, size=(300, 1)), rng.normal(25, 1, size=(300, 1))
    assert _histogram_agreement(x, x[::-1]) == pytest.approx(1.0)
    assert _histogram_agreement(x, y) < 0.1


# Features of videos, and the command


class _MeanColour:
    name, weights_sha256, official = "MeanColour", None, False

    def __init__(self):
        self.sizes = []

    def encode(self, images):
        self.sizes.append(len(images))
        return images.mean(dim=(2, 3))


def _transform(frames):
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float()


def _info(num_frames, name="p0000-0"):
    return VideoInfo(id=name, num_frames=num_frames, fps=16.0, height=6, width=8)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(0, 2**31))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_collected_features_do_not_depend_on_the_pieces(lengths, seed):
    num_frames = sum(lengths)
    if num_frames < 4:
        return
    frames = np.random.default_rng(seed).integers(0, 256, size=(num_frames, 6, 8, 3), dtype=np.uint8)
    encoder = _MeanColour()
    collector = FeatureCollector(encoder, _transform, num_frames=4)
    meter = collector.start(_info(num_frames))
    for start, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
        meter.push(frames[start : start + length])
    assert meter.finish() == {}
    edges = np.linspace(0, num_frames, 5).astype(int)
    chosen = [(a + b - 1) // 2 for a, b in zip(edges, edges[1:], strict=False)]
    assert collector.features["p0000-0"] == pytest.approx(frames[chosen].mean(axis=(1, 2)), rel=1e-5)
    assert max(encoder.sizes) <= 8


def test_collecting_refuses_odd_numbers_and_short_videos():
    with pytest.raises(ValueError, match="even number"):
        FeatureCollector(_MeanColour(), _transform, num_frames=7)
    with pytest.raises(ValueError, match="'p0000-0' has 9 frames"):
        FeatureCollector(_MeanColour(), _transform, num_frames=16).start(_info(9))


def test_folders_of_videos_are_measured_as_sets(tmp_path, capfd):
    """The command, in this process: the file says what the terminal does, and two equal folders are at distance 0."""
    for name, seeds in (("run", range(6)), ("same", range(6)), ("other", range(9, 15))):
        for seed in seeds:
            write_clip(tmp_path / name / f"clip-{seed}.mp4", seed=seed, num_frames=6)
    words = ("--num-frames", "4", "--allow-small")

    def call(reference, *more):
        code = run_app(app, ["evaluate", "sets", str(tmp_path / "run"), "--reference", str(reference), *words, *more])
        return code, *capfd.readouterr()

    code, stdout, _ = call(tmp_path / "same")
    written = json.loads((tmp_path / "run" / "sets.json").read_text())
    assert code == 0 and len(stdout.splitlines()) == 8 == len(written["scores"]) and written["num_frames"] == 4
    frechet, precision = (written["scores"][f"set/{key}[enc=hog+hist][ref=same]"] for key in ("frechet", "precision"))
    assert frechet["value"] == pytest.approx(0.0, abs=1e-9) and precision["value"] == 1.0
    assert frechet["details"] | {"num_dimensions": 0} == {
        "num_videos": 6,
        "num_reference": 6,
        "num_dimensions": 0,
        "is_small": True,
    }
    far = measure_sets(
        tmp_path / "run",
        tmp_path / "other",
        backbones=classical_backbones(),
        role="dino",
        num_frames=4,
        allow_small=True,
    )
    assert far.scores["set/frechet[enc=hog+hist][ref=other]"].value > 0.01
    for more, message in (
        (("--role", "musiq"), "role 'musiq' has no encoder of frames; known: dino, clip, dinov2, dreamsim"),
        (("--role", "clip"), "no backbone for 'clip'"),
        (("--num-frames", "8"), "has 6 frames"),
    ):
        code, _, stderr = call(tmp_path / "same", *more)
        assert code == 2 and message in stderr
    code, _, stderr = call(tmp_path)
    assert code == 2 and "holds 3 runs: give the folder of one" in stderr


def test_all_scores_of_a_set_under_their_names():
    groups = [
        {f"p{i:04d}-0": video for i, video in enumerate(_videos(seed, level=level))}
        for seed, level in ((14, 0.5), (15, 0.0))
    ]
    result = set_scores(*groups, encoder="MeanColour", reference="self_5s")
    assert list(result.specs) == list(result.scores)
    assert set(result.scores) == {
        f"set/{key}[enc=MeanColour][ref=self_5s]"
        for key in ("frechet", "precision", "recall", "density", "coverage", "stream_T", "stream_F", "stream_D")
    }
    for score in result.scores.values():
        assert score.value is not None
        assert (score.details["num_videos"], score.details["num_reference"]) == (40, 40)
    assert not result.specs["set/frechet[enc=MeanColour][ref=self_5s]"].higher_is_better
    assert not any(spec.comparable_to_published for spec in result.specs.values())


def test_what_a_small_set_cannot_give_says_why():
    own, other = ({str(i): v for i, v in enumerate(_videos(s, num=5))} for s in (16, 17))
    scores = set_scores(own, other, encoder="E", reference="R").scores
    assert "too small for 6 dimensions" in scores["set/frechet[enc=E][ref=R]"].skipped
    assert "num_neighbours=5" in scores["set/stream_F[enc=E][ref=R]"].skipped
    small = set_scores(own, other, encoder="E", reference="R", allow_small=True, num_neighbours=2).scores
    assert small["set/frechet[enc=E][ref=R]"].details["is_small"] is True
    assert all(score.value is not None for score in small.values())
    with pytest.raises(ValueError, match="sets of 5 and 0 videos"):
        set_scores(own, {}, encoder="E", reference="R")
