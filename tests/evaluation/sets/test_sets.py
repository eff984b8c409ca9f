"""Set measures against slow versions written from their definitions; identical, shifted and collapsed sets."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.evaluation.metric import VideoInfo
from longtake.evaluation.sets import (
    FeatureCollector,
    _frechet_name,
    _frechet_of_features,
    _histogram_agreement,
    _prdc,
    _spectrum,
    _write_features,
    frechet,
    read_features,
    set_scores,
    stream,
)


def _features(seed, num=60, dims=8, shift=0.0, scale=1.0):
    return shift + scale * np.random.default_rng(seed).normal(size=(num, dims))


# Frechet


def _frechet_by_eigenvalues(x, y):
    """The product's eigenvalues are real and not negative, so its root's trace is the sum of their roots."""
    means, covariances = [a.mean(axis=0) for a in (x, y)], [np.cov(a, rowvar=False) for a in (x, y)]
    root = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum()
    return ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1]) - 2 * root


def test_frechet_against_eigenvalues_of_the_product_and_against_moments():
    x, y = _features(0) @ _features(1, 8, 8), _features(2, 50, shift=0.3)
    expected = _frechet_by_eigenvalues(x, y)
    assert _frechet_of_features(x, y) == pytest.approx(expected, rel=1e-9)
    moments = [m for a in (x, y) for m in (a.mean(axis=0), np.cov(a, rowvar=False))]
    assert frechet(*moments) == pytest.approx(expected, rel=1e-9)
    assert _frechet_of_features(y, x) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_known_gaussians():
    one, four = np.eye(3), 4 * np.eye(3)
    assert frechet(np.zeros(3), one, np.ones(3), four) == pytest.approx(3 + 3 * (2 - 1) ** 2)
    x = _features(3)
    assert _frechet_of_features(x, x) == pytest.approx(0.0, abs=1e-12)
    assert _frechet_of_features(x + 0.5, x) == pytest.approx(8 * 0.25, rel=1e-9)


def test_frechet_of_singular_covariances_is_exact():
    x = _features(4, num=20, dims=200)
    assert _frechet_of_features(x, x, allow_small=True) == pytest.approx(0.0, abs=1e-10)
    assert _frechet_of_features(x, x + 0.1, allow_small=True) == pytest.approx(200 * 0.01, rel=1e-9)


def test_small_sets_are_refused_because_their_distance_is_biased():
    x, y = _features(5, num=30, dims=40), _features(6, num=30, dims=40)
    with pytest.raises(ValueError, match="30 and 30 videos are too small for 40 dimensions"):
        _frechet_of_features(x, y)
    large = [_features(seed, num=4000, dims=40) for seed in (7, 8)]
    assert _frechet_of_features(x, y, allow_small=True) > 20 * _frechet_of_features(*large)
    with pytest.raises(ValueError, match="too small"):
        _frechet_of_features(x[:1], y, allow_small=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(3), np.eye(3), np.zeros(2), np.eye(2)), "one length"),
        ((np.zeros(3), np.eye(2), np.zeros(3), np.eye(3)), "symmetric"),
        ((np.zeros(2), -np.eye(2), np.zeros(2), np.eye(2)), "eigenvalue -1"),
    ],
)
def test_what_is_no_gaussian_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        frechet(*arguments)


def test_features_must_match_and_be_finite():
    with pytest.raises(ValueError, match="equal dimensions"):
        _frechet_of_features(_features(0, dims=4), _features(0, dims=5))
    with pytest.raises(ValueError, match="NaN"):
        _prdc(np.full((9, 2), np.nan), _features(0, dims=2))


def test_fvd_is_the_name_of_one_network_only():
    assert _frechet_name("DINO", "real") == "set/frechet[enc=DINO][ref=real]"
    assert _frechet_name("I3D", "real") == "set/frechet[enc=I3D][ref=real]"
    assert _frechet_name("I3D", "real", is_standard_i3d=True) == "set/fvd[ref=real]"


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
    assert (result.precision, result.recall, result.density, result.coverage) == pytest.approx(expected)


def test_identical_far_and_collapsed_sets():
    x = _features(9, 700, 4)  # more than are handled at once
    same = _prdc(x, x)
    assert (same.precision, same.recall, same.density, same.coverage) == (1.0, 1.0, 1.0, 1.0)
    far = _prdc(x + 100.0, x)
    assert (far.precision, far.recall, far.density, far.coverage) == (0.0, 0.0, 0.0, 0.0)
    narrow = _prdc(0.05 * x, x)
    assert narrow.precision == 1.0 and narrow.recall < 0.1


def test_more_neighbours_than_there_are_is_refused():
    with pytest.raises(ValueError, match="num_neighbours=5 in a set of 5 videos"):
        _prdc(_features(0, 5), _features(1, 9))


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
    result = _spectrum(features)
    assert result.mean == pytest.approx(means, rel=1e-9)
    assert result.skewness == pytest.approx(skews, rel=1e-7)
    still = _spectrum(np.ones((16, 5)))
    assert np.isfinite(still.skewness).all()


@pytest.mark.parametrize("frames", [2, 15])
def test_an_odd_number_of_frames_is_refused(frames):
    with pytest.raises(ValueError, match="even number of frames"):
        _spectrum(np.zeros((frames, 3)))


def _videos(seed, num=40, frames=16, dims=6, *, noise=1.0, level=0.0):
    rng = np.random.default_rng(seed)
    walk = noise * rng.normal(size=(num, frames, dims)).cumsum(axis=1)
    return level + 3 * rng.normal(size=(num, 1, dims)) + walk


def test_stream_sees_what_changed_and_only_that():
    reference = _videos(11)
    same = stream(reference, reference)
    assert (same.temporal, same.fidelity, same.diversity) == (pytest.approx(1.0), 1.0, 1.0)
    shuffled = np.stack([np.random.default_rng(i).permutation(video) for i, video in enumerate(reference)])
    other_order = stream(shuffled, reference)
    assert (other_order.fidelity, other_order.diversity) == (1.0, 1.0)
    assert other_order.temporal < 0.5
    moved = stream(_videos(11, level=40.0), reference)
    assert (moved.fidelity, moved.diversity) == (0.0, 0.0)
    assert moved.temporal > 0.95
    collapsed = stream(np.repeat(reference[:2], 20, axis=0) + 0.01 * _videos(12), reference)
    assert collapsed.diversity < 0.3 < 0.9 < collapsed.fidelity


def test_stream_needs_videos_of_one_shape():
    with pytest.raises(ValueError, match="equal"):
        stream(_videos(0, frames=16), _videos(0, frames=18))


def test_histograms_share_their_range():
    rng = np.random.default_rng(13)
    x, y = rng.normal(5, 1, size=(300, 1)), rng.normal(25, 1, size=(300, 1))
    assert _histogram_agreement(x, x[::-1]) == pytest.approx(1.0)
    assert _histogram_agreement(x, y) < 0.1


# Features on disk


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
def test_collected_features_do_not_depend_on_the_pieces(tmp_path_factory, lengths, seed):
    num_frames = sum(lengths)
    if num_frames < 4:
        return
    folder = tmp_path_factory.mktemp("features")
    frames = np.random.default_rng(seed).integers(0, 256, size=(num_frames, 6, 8, 3), dtype=np.uint8)
    encoder = _MeanColour()
    meter = FeatureCollector(encoder, _transform, folder, num_frames=4).start(_info(num_frames))
    for start, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
        meter.push(frames[start : start + length])
    assert meter.finish() == {}
    edges = np.linspace(0, num_frames, 5).astype(int)
    chosen = [(a + b - 1) // 2 for a, b in zip(edges, edges[1:], strict=False)]
    stored = read_features(folder)["p0000-0"]
    assert stored == pytest.approx(frames[chosen].mean(axis=(1, 2)), rel=1e-5)
    assert max(encoder.sizes) <= 8 and list(folder.iterdir()) == [folder / "p0000-0.npy"]


def test_collecting_refuses_odd_numbers_and_short_videos(tmp_path):
    with pytest.raises(ValueError, match="even number"):
        FeatureCollector(_MeanColour(), _transform, tmp_path, num_frames=7)
    with pytest.raises(ValueError, match="'p0000-0' has 9 frames"):
        FeatureCollector(_MeanColour(), _transform, tmp_path, num_frames=16).start(_info(9))


def test_reading_refuses_nothing_garbage_and_mixed_shapes(tmp_path):
    with pytest.raises(ValueError, match="holds no features"):
        read_features(tmp_path)
    _write_features(tmp_path, "a", np.zeros((4, 3)))
    _write_features(tmp_path, "b", np.zeros((6, 3)))
    with pytest.raises(ValueError, match=r"\(4, 3\), \(6, 3\)"):
        read_features(tmp_path)
    (tmp_path / "c.npy").write_bytes(b"not an array")
    with pytest.raises(ValueError, match="cannot read the features"):
        read_features(tmp_path)


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
