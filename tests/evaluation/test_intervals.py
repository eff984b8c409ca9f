"""Means and paired differences: coverage on clustered videos, exact tests, power; wrong variants fail."""

from itertools import product
from math import comb, isnan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.evaluation.intervals import (
    _cluster_bootstrap,
    _detectable_errors,
    _sign_test,
    column_intervals,
    column_pairs,
    holm,
    mean_interval,
    ratio_by_prompt,
)

TRIALS = 300


def _clustered(rng, *, num_prompts=40, num_seeds=4, between=1.0, within=0.3, mean=0.0):
    level = mean + between * rng.normal(size=num_prompts)
    values = level[:, None] + within * rng.normal(size=(num_prompts, num_seeds))
    return {(p, s): float(values[p, s]) for p, s in product(range(num_prompts), range(num_seeds))}


def paired(values, baseline, **options):
    """One measure's difference over the videos both have."""
    keys = sorted(values.keys() & baseline.keys())
    own, other = (np.array([[source[key]] for key in keys]).reshape(-1, 1) for source in (values, baseline))
    return column_pairs(own, other, np.array([p for p, _ in keys], dtype=int), **options)[0]


def _plain_bootstrap(values, *, num_resamples):
    """Whole prompts drawn with replacement, one resample after the other."""
    by_prompt = {}
    for (prompt, _), value in values.items():
        by_prompt.setdefault(prompt, []).append(value)
    means = np.array([np.mean(own) for _, own in sorted(by_prompt.items())])
    draws = np.random.default_rng(0).integers(0, len(means), size=(num_resamples, len(means)))
    return means.mean(), *np.percentile([means[draw].mean() for draw in draws], [2.5, 97.5])


def test_intervals_of_clustered_videos_hold_the_truth_95_of_100_times_and_unclustered_ones_do_not():
    rng = np.random.default_rng(5)
    held = held_wrongly = 0
    for _ in range(TRIALS):
        values = _clustered(rng)
        own = mean_interval(values, num_resamples=2000)
        # The wrong variant: every video a prompt of its own.
        wrong = mean_interval({(i, 0): value for i, value in enumerate(values.values())}, num_resamples=2000)
        held += own.low <= 0.0 <= own.high
        held_wrongly += wrong.low <= 0.0 <= wrong.high
    assert 0.91 <= held / TRIALS <= 0.98
    assert held_wrongly / TRIALS < 0.75


def test_paired_intervals_hold_the_true_difference_and_are_narrower_than_unpaired_ones():
    rng = np.random.default_rng(6)
    held = 0
    for _ in range(TRIALS):
        baseline = _clustered(rng, between=2.0)
        change = _clustered(rng, between=0.3, within=0.2, mean=0.25)
        values = {key: baseline[key] + change[key] for key in baseline}
        pair = paired(values, baseline, num_resamples=2000)
        held += pair.low <= 0.25 <= pair.high
        own = mean_interval(values, num_resamples=2000)
        assert pair.high - pair.low < 0.5 * (own.high - own.low)
    assert 0.91 <= held / TRIALS <= 0.98


def test_a_difference_of_the_detectable_size_is_found_in_80_of_100_repetitions():
    rng = np.random.default_rng(7)
    zero = dict.fromkeys(_clustered(rng, num_prompts=30), 0.0)
    size = np.mean([paired(_clustered(rng, num_prompts=30), zero).minimum_detectable for _ in range(40)])
    found = [
        paired(_clustered(rng, num_prompts=30, mean=size), zero, num_resamples=2000).excludes_zero
        for _ in range(TRIALS)
    ]
    assert 0.74 <= np.mean(found) <= 0.88
    # Many prompts: the sum of the normal quantiles of 0.975 and 0.8.
    assert _detectable_errors(10**6) == pytest.approx(2.8016, abs=1e-3)
    assert _detectable_errors(2) == pytest.approx(12.706 + 1.376, abs=1e-3)


@given(st.integers(0, 40), st.integers(0, 40))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_sign_test_is_the_share_of_sign_patterns_at_least_as_lopsided(positive, negative):
    n = positive + negative
    distance = abs(positive - negative)
    reference = sum(comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= distance) / 2**n
    assert _sign_test(positive, negative) == pytest.approx(reference, rel=1e-12)
    assert (_sign_test(9, 1), _sign_test(8, 0), _sign_test(3, 2)) == (22 / 1024, 2 / 256, 1.0)


def test_signs_are_counted_by_prompt_and_ties_left_out():
    baseline = {(p, s): 1.0 for p in range(9) for s in range(4)}
    values = {(p, s): 1.0 + (p != 8) * (0.3 if s else -0.1) for p, s in baseline}
    pair = paired(values, baseline)
    assert (pair.num_pairs, pair.num_prompts, pair.sign_p) == (36, 9, 2 / 256)
    # Equal numbers that are added in another order are a tie as well.
    values = {(0, 0): 0.1, (0, 1): 0.7, (0, 2): 0.3}
    assert paired(values, {(0, 0): 0.3, (0, 1): 0.1, (0, 2): 0.7}).sign_p == 1.0


def test_holm_against_a_worked_table():
    nan = float("nan")
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "e": nan})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02, "e": nan}, nan_ok=True)
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
        assert repr(pairs[column]) == repr(paired(own, other, num_resamples=500))
        if own:
            plain = _plain_bootstrap(own, num_resamples=500)
            got = (intervals[column].mean, intervals[column].low, intervals[column].high)
            assert got == pytest.approx(plain, rel=1e-9)


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
    expected = paired(values, baseline)
    assert paired({**values, (99, 0): 5.0}, baseline) == expected
    swapped = paired(baseline, values)
    assert (swapped.difference, swapped.sign_p) == (pytest.approx(-expected.difference), expected.sign_p)


def test_nothing_and_one_prompt_claim_no_interval():
    nothing = paired({}, {(0, 0): 1.0})
    assert (nothing.num_pairs, nothing.num_prompts) == (0, 0)
    assert isnan(nothing.difference) and isnan(nothing.sign_p) and isnan(nothing.minimum_detectable)
    assert not nothing.excludes_zero
    one = paired({(0, 0): 2.0, (0, 1): 4.0}, {(0, 0): 1.0, (0, 1): 1.0})
    assert one.difference == 2.0 and isnan(one.low) and one.sign_p == 1.0
    assert isnan(mean_interval({}).mean)


def test_a_ratio_is_one_of_means():
    values = {(0, 0): 1.0, (0, 1): 3.0, (1, 0): 0.0, (2, 0): float("nan"), (9, 9): 5.0}
    reference = {(0, 0): 2.0, (0, 1): 2.0, (1, 0): 0.001, (2, 0): 1.0}
    ratio = ratio_by_prompt(values, reference, num_resamples=200)
    assert (ratio.mean, ratio.num_prompts) == (pytest.approx(2.0 / 2.001), 2)
    assert (ratio.low, ratio.high) == (0.0, 1.0)
    assert isnan(ratio_by_prompt(values, dict.fromkeys(values, 0.0), num_resamples=9).mean)
    one = ratio_by_prompt({(0, 0): 1.0}, {(0, 0): 4.0}, num_resamples=9)
    assert one.mean == 0.25 and isnan(one.low)


def test_limits_are_what_drawing_rows_gives_in_any_order_of_summation():
    """As another number of threads or another machine would have it: here, other shapes of the same product."""
    rng = np.random.default_rng(3)
    sums = rng.normal(size=(9, 130)) * 10.0 ** rng.integers(-6, 6, size=130)
    weights = rng.uniform(1, 50, size=(9, 130))
    draws = np.random.default_rng(0).integers(0, 9, size=(700, 9))
    limits = _cluster_bootstrap(sums, weights, num_resamples=700)
    for index in (0, 64, 129):
        drawn = sums[draws, index].sum(axis=1) / weights[draws, index].sum(axis=1)
        assert limits[:, index] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), rel=1e-9)
    spread = rng.normal(size=(128, 500))
    together = _cluster_bootstrap(spread, num_resamples=99)
    assert (together == _cluster_bootstrap(spread.copy(order="F"), num_resamples=99)).all()
    alone = [_cluster_bootstrap(spread[:, i : i + 1], num_resamples=99) for i in range(500)]
    assert (together == np.concatenate(alone, axis=1)).all()
