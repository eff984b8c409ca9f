"""Intervals: known values, coverage, and the clustering that a naive interval gets wrong."""

import numpy as np
import pytest

from longtake.evaluation.intervals import _bootstrap_by_prompt, _paired_by_prompt, cluster_bootstrap, wilson_interval


def test_wilson_matches_published_values():
    # Agresti and Coull (1998) style check: 8 of 10 gives (0.490, 0.943).
    interval = wilson_interval(8, 10)
    assert interval.mean == 0.8
    assert interval.low == pytest.approx(0.4902, abs=1e-4)
    assert interval.high == pytest.approx(0.9433, abs=1e-4)


@pytest.mark.parametrize("num_right", [0, 200])
def test_wilson_stays_inside_zero_and_one_and_contains_its_share(num_right):
    interval = wilson_interval(num_right, 200)
    assert 0.0 <= interval.low <= interval.mean <= interval.high <= 1.0
    assert interval.high - interval.low > 0.01


@pytest.mark.parametrize(("num_right", "num_trials"), [(1, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_impossible_counts(num_right, num_trials):
    with pytest.raises(ValueError, match="is no proportion"):
        wilson_interval(num_right, num_trials)


def test_bootstrap_covers_the_true_mean_of_clustered_values_and_ignoring_clusters_does_not():
    rng = np.random.default_rng(0)
    hits = naive_hits = 0
    for trial in range(200):
        level = rng.normal(size=30)
        values = (level[:, None] + 0.1 * rng.normal(size=(30, 4))).ravel()
        prompts = np.repeat(np.arange(30), 4)
        interval = _bootstrap_by_prompt(values, prompts, num_resamples=400, seed=trial)
        naive = _bootstrap_by_prompt(values, np.arange(120), num_resamples=400, seed=trial)
        hits += interval.low <= 0.0 <= interval.high
        naive_hits += naive.low <= 0.0 <= naive.high
    assert hits >= 180
    assert naive_hits <= 150


def test_bootstrap_weighs_prompts_equally_and_leaves_out_nan():
    interval = _bootstrap_by_prompt([1.0, 1.0, 1.0, 0.0, np.nan], [0, 0, 0, 1, 2])
    assert interval.mean == 0.5
    assert interval.num_prompts == 2


def test_bootstrap_of_nothing_and_of_one_prompt_claims_no_interval():
    assert np.isnan(_bootstrap_by_prompt([np.nan], [0]).mean)
    lone = _bootstrap_by_prompt([0.25, 0.75], [7, 7])
    assert lone.mean == 0.5
    assert np.isnan(lone.low)
    assert not lone.excludes_zero


def test_pairing_removes_the_spread_between_prompts():
    rng = np.random.default_rng(1)
    base = {(p, s): float(10 * rng.normal()) for p in range(20) for s in range(2)}
    better = {key: value + 1.0 for key, value in base.items() if key != (3, 1)}
    paired = _paired_by_prompt(better, base)
    assert paired.mean == pytest.approx(1.0)
    assert paired.excludes_zero
    unpaired = _bootstrap_by_prompt(list(better.values()), [p for p, _ in better])
    assert not unpaired.excludes_zero


def test_many_means_at_once_are_what_drawing_rows_gives():
    rng = np.random.default_rng(3)
    sums, weights = (
        rng.normal(size=(9, 130)) * 10.0 ** rng.integers(-6, 6, size=130),
        rng.uniform(1, 50, size=(9, 130)),
    )
    draws = np.random.default_rng(4).integers(0, 9, size=(700, 9))
    limits = cluster_bootstrap(sums, weights, num_resamples=700, seed=4)
    for index in (0, 64, 129):
        drawn = sums[draws, index].sum(axis=1) / weights[draws, index].sum(axis=1)
        assert limits[:, index] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), rel=1e-9)
    assert cluster_bootstrap(np.full((4, 1), 0.1), num_resamples=50) == pytest.approx(0.1, rel=1e-15)


def test_limits_do_not_depend_on_the_order_of_summation():
    """As another number of threads or another machine would have it: here, other shapes of the same product."""
    spread = np.random.default_rng(5).normal(size=(128, 500))
    assert (
        cluster_bootstrap(spread, num_resamples=99) == cluster_bootstrap(spread.copy(order="F"), num_resamples=99)
    ).all()
    one_by_one = np.concatenate(
        [cluster_bootstrap(spread[:, i : i + 1], num_resamples=99) for i in range(500)], axis=1
    )
    assert (cluster_bootstrap(spread, num_resamples=99) == one_by_one).all()


@pytest.mark.parametrize(("shape", "num_resamples"), [((1, 3), 10), ((4, 3), 0)])
def test_a_bootstrap_of_nothing_is_refused(shape, num_resamples):
    with pytest.raises(ValueError, match="has no limits"):
        cluster_bootstrap(np.zeros(shape), num_resamples=num_resamples)
