"""Paired comparisons: coverage on clustered videos, exact tests, a power that is kept; a wrong variant fails."""

from itertools import product
from math import comb, isnan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.evaluation.intervals import _bootstrap_by_prompt
from longtake.evaluation.paired import (
    _detectable_errors,
    _paired_difference,
    _sign_test,
    column_intervals,
    column_pairs,
    holm,
    mean_interval,
)

TRIALS = 300


def _clustered(rng, *, num_prompts=40, num_seeds=4, between=1.0, within=0.3, mean=0.0):
    level = mean + between * rng.normal(size=num_prompts)
    values = level[:, None] + within * rng.normal(size=(num_prompts, num_seeds))
    return {(p, s): float(values[p, s]) for p, s in product(range(num_prompts), range(num_seeds))}


def _as_if_independent(values):
    """The wrong variant: every video a prompt of its own."""
    return {(index, 0): value for index, value in enumerate(values.values())}


def test_intervals_of_clustered_videos_hold_the_truth_95_of_100_times_and_unclustered_ones_do_not():
    rng = np.random.default_rng(5)
    held = held_wrongly = 0
    for trial in range(TRIALS):
        values = _clustered(rng)
        own = mean_interval(values, num_resamples=600, seed=trial)
        wrong = mean_interval(_as_if_independent(values), num_resamples=600, seed=trial)
        held += own.low <= 0.0 <= own.high
        held_wrongly += wrong.low <= 0.0 <= wrong.high
    assert 0.91 <= held / TRIALS <= 0.98
    assert held_wrongly / TRIALS < 0.75


def test_paired_intervals_hold_the_true_difference_and_are_narrower_than_unpaired_ones():
    rng = np.random.default_rng(6)
    held = 0
    for trial in range(TRIALS):
        baseline = _clustered(rng, between=2.0)
        change = _clustered(rng, between=0.3, within=0.2, mean=0.25)
        values = {key: baseline[key] + change[key] for key in baseline}
        paired = _paired_difference(values, baseline, num_resamples=600, seed=trial)
        held += paired.low <= 0.25 <= paired.high
        assert paired.high - paired.low < 0.5 * (mean_interval(values).high - mean_interval(values).low)
    assert 0.91 <= held / TRIALS <= 0.98


def test_a_difference_of_the_detectable_size_is_found_in_80_of_100_repetitions():
    rng = np.random.default_rng(7)
    zero = dict.fromkeys(_clustered(rng, num_prompts=30), 0.0)
    size = np.mean([_paired_difference(_clustered(rng, num_prompts=30), zero).minimum_detectable for _ in range(40)])
    found = [
        _paired_difference(_clustered(rng, num_prompts=30, mean=size), zero, num_resamples=600).excludes_zero
        for _ in range(TRIALS)
    ]
    assert 0.74 <= np.mean(found) <= 0.88


@pytest.mark.parametrize(
    ("positive", "negative", "p"),
    [(0, 0, 1.0), (5, 5, 1.0), (9, 1, 22 / 1024), (1, 9, 22 / 1024), (8, 0, 2 / 256), (6, 2, 74 / 256), (3, 2, 1.0)],
)
def test_sign_test_by_hand(positive, negative, p):
    assert _sign_test(positive, negative) == pytest.approx(p, rel=1e-12)


@given(st.integers(0, 40), st.integers(0, 40))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_sign_test_is_the_share_of_sign_patterns_at_least_as_lopsided(positive, negative):
    n = positive + negative
    distance = abs(positive - negative)
    reference = sum(comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= distance) / 2**n
    assert _sign_test(positive, negative) == pytest.approx(reference, rel=1e-12)


def test_signs_are_counted_by_prompt_and_ties_left_out():
    baseline = {(p, s): 1.0 for p in range(9) for s in range(4)}
    values = {(p, s): 1.0 + (p != 8) * (0.3 if s else -0.1) for p, s in baseline}
    paired = _paired_difference(values, baseline)
    assert (paired.num_pairs, paired.num_prompts) == (36, 9)
    assert paired.sign_p == _sign_test(8, 0) == 2 / 256


def test_equal_numbers_added_in_another_order_are_a_tie():
    values = {(0, 0): 0.1, (0, 1): 0.7, (0, 2): 0.3}
    assert _paired_difference(values, {(0, 0): 0.3, (0, 1): 0.1, (0, 2): 0.7}).sign_p == 1.0


def test_students_quantiles_against_a_table():
    table = {2: (12.706, 1.376), 3: (4.303, 1.061), 4: (3.182, 0.978), 6: (2.571, 0.920), 11: (2.228, 0.879)}
    for num_clusters, (t975, t80) in table.items():
        assert _detectable_errors(num_clusters) == pytest.approx(t975 + t80, rel=0.01)
    assert _detectable_errors(10**6) == pytest.approx(2.8016, abs=1e-3)


def test_holm_against_a_worked_table():
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "e": float("nan")})
    assert adjusted == {
        "a": pytest.approx(0.03),
        "b": pytest.approx(0.06),
        "c": pytest.approx(0.06),
        "d": pytest.approx(0.02),
        "e": pytest.approx(float("nan"), nan_ok=True),
    }
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_holm_keeps_false_alarms_rare_where_plain_tests_do_not():
    rng = np.random.default_rng(8)
    plain = adjusted = 0
    for _ in range(400):
        ups = rng.binomial(40, 0.5, size=12)
        p = {str(i): _sign_test(int(k), int(40 - k)) for i, k in enumerate(ups)}
        plain += min(p.values()) <= 0.05
        adjusted += min(holm(p).values()) <= 0.05
    assert adjusted / 400 <= 0.06 < 0.25 < plain / 400


def test_many_columns_at_once_are_what_one_at_a_time_gives():
    rng = np.random.default_rng(9)
    prompts = np.repeat(np.arange(12), 3)
    values, baseline = rng.normal(size=(2, 36, 150))
    values[rng.random(values.shape) < 0.3] = np.nan
    values[prompts == 4, 10:20] = np.nan
    values[:, 30] = np.nan
    keys = [(int(p), i % 3) for i, p in enumerate(prompts)]
    intervals = column_intervals(values, prompts, num_resamples=500)
    pairs = column_pairs(values, baseline, prompts, num_resamples=500)
    for column in (0, 15, 30, 149):
        own = {k: float(v) for k, v in zip(keys, values[:, column], strict=True) if not np.isnan(v)}
        other = dict(zip(keys, baseline[:, column].tolist(), strict=True))
        assert repr(intervals[column]) == repr(mean_interval(own, num_resamples=500))
        assert repr(pairs[column]) == repr(_paired_difference(own, other, num_resamples=500))
        plain = _bootstrap_by_prompt(list(own.values()), [p for p, _ in own], num_resamples=500)
        assert (intervals[column].num_prompts, intervals[column].mean) == (
            plain.num_prompts,
            pytest.approx(plain.mean, nan_ok=True),
        )
        assert intervals[column].low == pytest.approx(plain.low, rel=1e-12, nan_ok=True)


def test_weights_are_those_of_videos():
    values = {(0, 0): 1.0, (0, 1): 0.0, (1, 0): 0.5}
    weights = {(0, 0): 3.0, (0, 1): 1.0, (1, 0): 4.0}
    assert mean_interval(values, weights).mean == pytest.approx((3 + 2) / 8)
    assert mean_interval(values).mean == 0.5
    with pytest.raises(ValueError, match=r"video \(0, 1\)"):
        mean_interval(values, {**weights, (0, 1): 0.0})


def test_order_and_added_prompts_without_partner_change_nothing():
    rng = np.random.default_rng(10)
    baseline, values = _clustered(rng), _clustered(rng)
    shuffled = {key: values[key] for key in sorted(values, reverse=True)}
    expected = _paired_difference(values, baseline)
    assert _paired_difference(shuffled, baseline) == expected
    assert _paired_difference({**values, (99, 0): 5.0}, baseline) == expected
    swapped = _paired_difference(baseline, values)
    assert swapped.difference == pytest.approx(-expected.difference)
    assert swapped.sign_p == expected.sign_p


def test_nothing_and_one_prompt_claim_no_interval():
    nothing = _paired_difference({}, {(0, 0): 1.0})
    assert (nothing.num_pairs, nothing.num_prompts) == (0, 0)
    assert isnan(nothing.difference) and isnan(nothing.sign_p) and isnan(nothing.minimum_detectable)
    assert not nothing.excludes_zero
    one = _paired_difference({(0, 0): 2.0, (0, 1): 4.0}, {(0, 0): 1.0, (0, 1): 1.0})
    assert one.difference == 2.0 and isnan(one.low) and one.sign_p == 1.0
    assert isnan(mean_interval({}).mean)
