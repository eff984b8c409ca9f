"""Means and paired differences of measures, with intervals that know that videos of one prompt are alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import ceil, comb, fsum, log2, nan

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

NUM_RESAMPLES = 10_000
_MEASURES_AT_ONCE = 64  # times 10,000 resamples: 5 MB, which a cache of the second level nearly holds
Values = Mapping[tuple[int, int], float]  # {(prompt index, seed index): value} of one measure, one entry per video


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its 95 % interval and the number of prompts behind it; NaN stands for what is not known."""

    mean: float
    low: float
    high: float
    num_prompts: int


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Difference of a measure to the baseline's, over the videos that both have."""

    difference: float  # mean over prompts of the mean over seeds; NaN without a common video
    low: float  # lower limit of its 95 % interval, prompts redrawn; NaN under two prompts
    high: float  # upper limit
    num_pairs: int  # common videos
    num_prompts: int  # prompts among them
    sign_p: float  # two-sided sign test over prompts; NaN without a common video
    # The smallest true difference that such a comparison finds in 80 of 100 repetitions, at the two-sided 5 % level;
    # NaN under two prompts. A smaller difference that was not found may still be there.
    minimum_detectable: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0.0 or self.high < 0.0


def mean_interval(values: Values, weights: Values | None = None, *, num_resamples: int = NUM_RESAMPLES) -> Interval:
    """Mean of a measure with its 95 % interval, whole prompts redrawn.

    ``weights`` are those of the videos in the mean, e.g. their numbers of clips; without them it is the mean over
    prompts of the mean over seeds.
    """
    keys = sorted(values)
    if weights is not None and (bad := [key for key in keys if not weights.get(key, 0.0) > 0.0]):
        raise ValueError(
            f"video {bad[0]} (prompt, seed) has weight {weights.get(bad[0])}: every weight must be above 0."
        )
    prompts = np.array([prompt for prompt, _ in keys], dtype=np.int64)
    weight = None if weights is None else _column(weights, keys)
    return column_intervals(_column(values, keys), prompts, weight, num_resamples=num_resamples)[0]


def _column(values: Values, keys: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
    return np.array([values[key] for key in keys], dtype=np.float64).reshape(-1, 1)


def column_intervals(
    values: NDArray, prompts: NDArray, weights: NDArray | None = None, *, num_resamples: int = NUM_RESAMPLES
) -> list[Interval]:
    """:func:`mean_interval` of many measures at once.

    Args:
        values: (videos, measures); NaN where a measure has no value for a video.
        prompts: (videos,), the prompt of each.
        weights: (videos, measures), positive; None for the mean over prompts of the mean over seeds.
        num_resamples: Bootstrap resamples of whole prompts.
    """
    sums, totals = _by_prompt(values, prompts, weights)
    counts = (totals > 0).sum(axis=0)
    means = np.divide(_sum(sums), _sum(totals), out=np.full(sums.shape[1], nan), where=counts > 0)
    low, high = _limits(sums, totals, is_weighted=weights is not None, num_resamples=num_resamples)
    rows = zip(means.tolist(), low.tolist(), high.tolist(), counts.tolist(), strict=True)
    return [Interval(mean=m, low=lo, high=hi, num_prompts=n) for m, lo, hi, n in rows]


def column_pairs(
    values: NDArray, baseline: NDArray, prompts: NDArray, *, num_resamples: int = NUM_RESAMPLES
) -> list[Paired]:
    """Differences ``values - baseline`` of many measures over the videos both have: same prompt, same seed.

    ``values`` and ``baseline`` are (videos, measures) of the same prompts and seeds, NaN where there is no value.
    """
    differences = values - baseline
    means, present = _by_prompt(differences, prompts, None)
    counts = present.sum(axis=0).astype(int)
    total = _sum(means)
    average = np.divide(total, counts, out=np.full(len(total), nan), where=counts > 0)
    spread = np.where(present > 0, means - np.nan_to_num(average), 0.0)
    errors = np.sqrt(_sum(spread**2) / np.maximum(counts - 1, 1) / np.maximum(counts, 1))
    # Differences of equal numbers, summed in another order, are not exactly zero.
    smallest = 1e-12 * np.nan_to_num(np.fmax(np.abs(values), np.abs(baseline))).max(axis=0, initial=0.0)
    positive, negative = (means > smallest).sum(axis=0), (means < -smallest).sum(axis=0)
    low, high = _limits(means, present, is_weighted=False, num_resamples=num_resamples)
    pairs = (~np.isnan(differences)).sum(axis=0)
    return [
        Paired(
            difference=float(average[i]),
            low=float(low[i]),
            high=float(high[i]),
            num_pairs=int(pairs[i]),
            num_prompts=int(counts[i]),
            sign_p=_sign_test(int(positive[i]), int(negative[i])) if counts[i] else nan,
            minimum_detectable=_detectable_errors(int(counts[i])) * float(errors[i]) if counts[i] > 1 else nan,
        )
        for i in range(len(counts))
    ]


def ratio_by_prompt(values: Values, reference: Values, *, num_resamples: int) -> Interval:
    """Mean of ``values`` over mean of ``reference`` on the videos both have, with its interval clustered by prompt.

    A ratio of means, not a mean of ratios: a video whose reference is nearly zero does not decide it. NaN without
    videos or where the reference is zero.
    """
    by_prompt: dict[int, list[tuple[float, float]]] = {}
    for key in sorted(values.keys() & reference.keys()):
        if not np.isnan(pair := (values[key], reference[key])).any():
            by_prompt.setdefault(key[0], []).append(pair)
    means = np.array([np.mean(rows, axis=0) for rows in by_prompt.values()]).reshape(-1, 2)
    if not len(means) or means[:, 1].mean() == 0:
        return Interval(mean=nan, low=nan, high=nan, num_prompts=0)
    ratio = float(means[:, 0].mean() / means[:, 1].mean())
    if len(means) == 1:
        return Interval(mean=ratio, low=nan, high=nan, num_prompts=1)
    draws = np.random.default_rng(0).integers(0, len(means), size=(num_resamples, len(means)))
    drawn = means[draws].mean(axis=1)
    low, high = np.nanpercentile(drawn[:, 0] / np.where(drawn[:, 1] > 0, drawn[:, 1], nan), [2.5, 97.5])
    return Interval(mean=ratio, low=float(low), high=float(high), num_prompts=len(means))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust p-values for having tested several: the chance of any false alarm among them stays at the level.

    NaN stands where nothing could be tested, and counts for nothing.

    Source: S. Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    adjusted = dict.fromkeys(p_values, nan)
    tested = sorted((p, name) for name, p in p_values.items() if not np.isnan(p))
    floor = 0.0
    for position, (p, name) in enumerate(tested):
        floor = max(floor, min(1.0, (len(tested) - position) * p))
        adjusted[name] = floor
    return adjusted


@cache
def _sign_test(num_positive: int, num_negative: int) -> float:
    """Two-sided exact p that so many of so many signs are positive if both are equally likely; ties are left out."""
    n, k = num_positive + num_negative, min(num_positive, num_negative)
    return min(1.0, 2 * sum(comb(n, i) for i in range(k + 1)) / 2**n)


@cache
def _detectable_errors(num_prompts: int) -> float:
    """Standard errors a true mean must be from zero to be found with 80 % power at the two-sided 5 % level.

    2.80 for many prompts; Student's quantiles make it more for few, whose standard error is itself uncertain.
    """
    return float(stdtrit(num_prompts - 1, [0.975, 0.8]).sum())


def _by_prompt(values: NDArray, prompts: NDArray, weights: NDArray | None) -> tuple[NDArray, NDArray]:
    """Sums and weights per prompt, (prompts, measures); without weights the prompt's mean and 1. Both 0 if missing."""
    names, owner = np.unique(prompts, return_inverse=True)
    present = ~np.isnan(values)
    weight = present.astype(np.float64) if weights is None else np.where(present, weights, 0.0)
    sums, totals = np.zeros((2, len(names), values.shape[1]))
    np.add.at(sums, owner, weight * np.where(present, values, 0.0))
    np.add.at(totals, owner, weight)
    if weights is not None:
        return sums, totals
    return np.divide(sums, totals, out=sums, where=totals > 0), (totals > 0).astype(np.float64)


def _sum(columns: NDArray) -> NDArray[np.float64]:
    """Sum of each column, rounded once, so that it depends on no order."""
    return np.array([fsum(column) for column in columns.T.tolist()], dtype=np.float64)


def _limits(sums: NDArray, totals: NDArray, *, is_weighted: bool, num_resamples: int) -> NDArray[np.float64]:
    """(2, measures); measures that miss the same prompts share a bootstrap over the prompts they have."""
    limits = np.full((2, sums.shape[1]), nan)
    patterns: dict[bytes, list[int]] = {}
    present = totals > 0
    for index, column in enumerate(np.ascontiguousarray(present.T)):
        patterns.setdefault(column.tobytes(), []).append(index)
    for indices in patterns.values():
        rows = np.flatnonzero(present[:, indices[0]])
        if len(rows) > 1:
            part = np.ix_(rows, np.array(indices))
            weights = totals[part] if is_weighted else None
            limits[:, indices] = _cluster_bootstrap(sums[part], weights, num_resamples=num_resamples)
    return limits


def _cluster_bootstrap(sums: NDArray, weights: NDArray | None = None, *, num_resamples: int) -> NDArray[np.float64]:
    """95 % limits of many means at once, each over the same number of clusters, whole clusters redrawn.

    The same on any machine and with any number of threads: the terms are rounded to a grid so fine (1e-12 of the
    largest) that all sums are exact. Why not ``scipy.stats.bootstrap``: docs/adr/0022.

    Args:
        sums: (clusters, measures), a cluster's weighted sum; its mean where all clusters weigh the same.
        weights: (clusters, measures), positive; None where all weigh the same.
        num_resamples: Bootstrap resamples, the same for every measure.

    Returns:
        (2, measures): 2.5 % and 97.5 % percentiles of sum(sums) / sum(weights).

    Source: the percentile bootstrap over clusters (Davison and Hinkley, 1997, section 3.8).
    """
    counts = _draw_counts(len(sums), num_resamples)
    limits = np.empty((2, sums.shape[1]))
    for start in range(0, sums.shape[1], _MEASURES_AT_ONCE):
        part = slice(start, start + _MEASURES_AT_ONCE)
        means = counts @ _on_grid(sums[:, part])
        means /= len(sums) if weights is None else counts @ _on_grid(weights[:, part])
        limits[:, part] = _percentiles(np.ascontiguousarray(means.T))
    return limits


@lru_cache(maxsize=4)
def _draw_counts(num_clusters: int, num_resamples: int) -> NDArray[np.float64]:
    """(resamples, clusters): how often each cluster was drawn."""
    draws = np.random.default_rng(0).integers(0, num_clusters, size=(num_resamples, num_clusters))
    flat = (draws + num_clusters * np.arange(num_resamples)[:, None]).ravel()
    counts = np.bincount(flat, minlength=num_resamples * num_clusters).reshape(draws.shape).astype(np.float64)
    counts.setflags(write=False)
    return counts


def _on_grid(columns: NDArray) -> NDArray[np.float64]:
    """Columns rounded so that a sum of as many terms as there are rows fits 53 bits, in whatever order it is taken."""
    largest = np.abs(columns).max(axis=0)
    bits = 52 - ceil(log2(len(columns)))
    exponent = np.where(largest > 0, bits - np.frexp(largest)[1], 0)
    return np.ldexp(np.rint(np.ldexp(columns, exponent)), -exponent)


def _percentiles(rows: NDArray) -> NDArray[np.float64]:
    """(2, rows): 2.5 % and 97.5 % percentiles of each row, interpolated; reorders the rows."""
    positions = np.array([0.025, 0.975]) * (rows.shape[1] - 1)
    below = np.floor(positions).astype(int)
    above = np.minimum(below + 1, rows.shape[1] - 1)
    rows.partition(sorted({*below.tolist(), *above.tolist()}), axis=1)
    share = (positions - below)[:, None]
    return rows[:, below].T * (1 - share) + rows[:, above].T * share
