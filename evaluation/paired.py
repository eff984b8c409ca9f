"""Is one policy better than another: paired differences on the same prompts and seeds, with what they can show."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import comb, fsum, nan, pi, sqrt, tan

import numpy as np
from numpy.typing import NDArray

from longtake.evaluation.intervals import Interval, cluster_bootstrap

NUM_RESAMPLES = 10_000
NORMAL_80 = 0.8416212335729143
Values = Mapping[tuple[int, int], float]
"""{(prompt index, seed index): value} of one measure, one entry per video."""


@dataclass(frozen=True, kw_only=True)
class Paired:
    """How much higher a measure is than the baseline's, over the videos that both have.

    Attributes:
        difference: Mean over prompts of the mean over seeds; NaN without a common video.
        low: Lower limit of its 95 % interval, prompts redrawn; NaN under two prompts.
        high: Upper limit.
        num_pairs: Common videos.
        num_prompts: Prompts among them.
        sign_p: Two-sided sign test over prompts; NaN without a common video.
        minimum_detectable: The smallest true difference that such a comparison finds in 80 of 100 repetitions, at the
            two-sided 5 % level; NaN under two prompts. A smaller difference that was not found may still be there.
    """

    difference: float
    low: float
    high: float
    num_pairs: int
    num_prompts: int
    sign_p: float
    minimum_detectable: float

    @property
    def excludes_zero(self) -> bool:
        """True where the whole interval lies on one side of zero."""
        return self.low > 0.0 or self.high < 0.0


def mean_interval(
    values: Values, weights: Values | None = None, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Interval:
    """Mean of a measure with its 95 % interval, the videos of one prompt not counted as independent.

    Args:
        values: One value per video.
        weights: Of each video in the mean, e.g. its number of clips; then the mean is sum(w v) / sum(w) over videos.
            None: the mean over prompts of the mean over seeds.
        num_resamples: Bootstrap resamples of whole prompts.
        seed: Of the resampling.

    Returns:
        NaN limits under two prompts; a NaN mean without videos.

    Raises:
        ValueError: If a video has no weight, or one that is not positive.
    """
    keys = sorted(values)
    if weights is not None and (bad := [key for key in keys if not weights.get(key, 0.0) > 0.0]):
        raise ValueError(
            f"video {bad[0]} (prompt, seed) has weight {weights.get(bad[0])}: every weight must be above 0."
        )
    column = np.array([[values[key]] for key in keys], dtype=np.float64).reshape(-1, 1)
    weight = None if weights is None else np.array([[weights[key]] for key in keys], dtype=np.float64).reshape(-1, 1)
    prompts = np.array([prompt for prompt, _ in keys], dtype=np.int64)
    return column_intervals(column, prompts, weight, num_resamples=num_resamples, seed=seed)[0]


def _paired_difference(
    values: Values, baseline: Values, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Paired:
    """``values - baseline`` over the videos both have: same prompt, same seed.

    Args:
        values: Of the policy.
        baseline: Of the policy compared against.
        num_resamples: Bootstrap resamples of whole prompts.
        seed: Of the resampling.

    Returns:
        The difference and what it is worth.
    """
    keys = sorted(values.keys() & baseline.keys())
    own = np.array([[values[key]] for key in keys], dtype=np.float64).reshape(-1, 1)
    other = np.array([[baseline[key]] for key in keys], dtype=np.float64).reshape(-1, 1)
    prompts = np.array([prompt for prompt, _ in keys], dtype=np.int64)
    return column_pairs(own, other, prompts, num_resamples=num_resamples, seed=seed)[0]


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust p-values for having tested several: the chance of any false alarm among them stays at the level.

    Args:
        p_values: {what was tested: p}; NaN where nothing could be tested, which counts for nothing.

    Returns:
        {the same names: adjusted p}.

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
def _detectable_errors(num_clusters: int) -> float:
    """How many standard errors a true mean must be from zero to be found with 80 % power at the two-sided 5 % level.

    2.80 for many clusters; Student's quantiles make it more for few, whose standard error is itself uncertain.
    """
    return _student_quantile(1.959963984540054, 0.975, num_clusters - 1) + _student_quantile(
        NORMAL_80, 0.8, num_clusters - 1
    )


def _student_quantile(normal: float, p: float, freedom: int) -> float:
    """Student's quantile from the normal one: exact for 1 and 2 degrees, within 1 % from 3 on.

    Source: Abramowitz and Stegun (1964), 26.7.5.
    """
    if freedom == 1:
        return tan(pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) / sqrt(2 * p * (1 - p))
    x, v = normal, freedom
    return (
        x
        + (x**3 + x) / (4 * v)
        + (5 * x**5 + 16 * x**3 + 3 * x) / (96 * v**2)
        + (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / (384 * v**3)
        + (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / (92160 * v**4)
    )


def column_intervals(
    values: NDArray,
    prompts: NDArray,
    weights: NDArray | None = None,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """:func:`mean_interval` of many measures at once.

    Args:
        values: (videos, measures); NaN where a measure has no value for a video.
        prompts: (videos,), the prompt of each.
        weights: (videos, measures), positive; None for the mean over prompts of the mean over seeds.
        num_resamples: Bootstrap resamples of whole prompts.
        seed: Of the resampling.

    Returns:
        One interval per measure.
    """
    sums, totals = _by_prompt(values, prompts, weights)
    counts = (totals > 0).sum(axis=0)
    means = np.divide(_sum(sums), _sum(totals), out=np.full(sums.shape[1], nan), where=counts > 0)
    low, high = _limits(sums, totals, is_weighted=weights is not None, num_resamples=num_resamples, seed=seed)
    rows = zip(means.tolist(), low.tolist(), high.tolist(), counts.tolist(), strict=True)
    return [Interval(mean=m, low=lo, high=hi, num_prompts=n) for m, lo, hi, n in rows]


def column_pairs(
    values: NDArray, baseline: NDArray, prompts: NDArray, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> list[Paired]:
    """:func:`paired_difference` of many measures at once.

    Args:
        values: (videos, measures), NaN where there is no value.
        baseline: (videos, measures), of the same prompts and seeds.
        prompts: (videos,), the prompt of each.
        num_resamples: Bootstrap resamples of whole prompts.
        seed: Of the resampling.

    Returns:
        One comparison per measure.
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
    low, high = _limits(means, present, is_weighted=False, num_resamples=num_resamples, seed=seed)
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


def _limits(
    sums: NDArray, totals: NDArray, *, is_weighted: bool, num_resamples: int, seed: int
) -> tuple[NDArray, NDArray]:
    """Limits per measure; measures that miss the same prompts share a bootstrap over the prompts they have."""
    limits = np.full((2, sums.shape[1]), nan)
    patterns: dict[bytes, list[int]] = {}
    present = totals > 0
    for index, column in enumerate(np.ascontiguousarray(present.T)):
        patterns.setdefault(column.tobytes(), []).append(index)
    for indices in patterns.values():
        rows = np.flatnonzero(present[:, indices[0]])
        if len(rows) > 1:
            part = np.ix_(rows, indices)
            weights = totals[part] if is_weighted else None
            limits[:, indices] = cluster_bootstrap(sums[part], weights, num_resamples=num_resamples, seed=seed)
    return limits[0], limits[1]
