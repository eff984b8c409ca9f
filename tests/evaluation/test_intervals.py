"""Intervals: known values, coverage, and the clustering that a naive interval gets wrong."""

import numpy as np
import pytest

from longtake.evaluation.intervals import bootstrap_by_prompt, paired_by_prompt, wilson_interval


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
        interval = bootstrap_by_prompt(values, prompts, num_resamples=400, seed=trial)
        naive = bootstrap_by_prompt(values, np.arange(120), num_resamples=400, seed=trial)
        hits += interval.low <= 0.0 <= interval.high
        naive_hits += naive.low <= 0.0 <= naive.high
    assert hits >= 180
    assert naive_hits <= 150


def test_bootstrap_weighs_prompts_equally_and_leaves_out_nan():
    interval = bootstrap_by_prompt([1.0, 1.0, 1.0, 0.0, np.nan], [0, 0, 0, 1, 2])
    assert interval.mean == 0.5
    assert interval.num_prompts == 2


def test_bootstrap_of_nothing_and_of_one_prompt_claims_no_interval():
    assert np.isnan(bootstrap_by_prompt([np.nan], [0]).mean)
    lone = bootstrap_by_prompt([0.25, 0.75], [7, 7])
    assert lone.mean == 0.5
    assert np.isnan(lone.low)
    assert not lone.excludes_zero


def test_pairing_removes_the_spread_between_prompts():
    rng = np.random.default_rng(1)
    base = {(p, s): float(10 * rng.normal()) for p in range(20) for s in range(2)}
    better = {key: value + 1.0 for key, value in base.items() if key != (3, 1)}
    paired = paired_by_prompt(better, base)
    assert paired.mean == pytest.approx(1.0)
    assert paired.excludes_zero
    unpaired = bootstrap_by_prompt(list(better.values()), [p for p, _ in better])
    assert not unpaired.excludes_zero
