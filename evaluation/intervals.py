"""Confidence intervals for proportions and for curves measured on a few prompts with several seeds each."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, log2, sqrt

import numpy as np
from numpy.typing import NDArray

NORMAL_95 = 1.959963984540054


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its 95 % interval, and the number of prompts behind it.

    ``mean``, ``low`` and ``high`` are NaN where no prompt has a value.
    """

    mean: float
    low: float
    high: float
    num_prompts: int

    @property
    def excludes_zero(self) -> bool:
        """True where the whole interval lies on one side of zero."""
        return self.low > 0.0 or self.high < 0.0


def wilson_interval(num_right: int, num_trials: int) -> Interval:
    """95 % interval of a proportion of independent trials.

    Args:
        num_right: successes, 0..num_trials.
        num_trials: trials, at least 1.

    Returns:
        The observed proportion and Wilson's score interval, inside [0, 1].

    Raises:
        ValueError: If the counts are not 0 <= num_right <= num_trials with num_trials >= 1.

    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927).
    """
    if num_trials < 1 or not 0 <= num_right <= num_trials:
        raise ValueError(
            f"num_right={num_right} of num_trials={num_trials} is no proportion: "
            "use num_trials >= 1 and 0 <= num_right <= num_trials."
        )
    share = num_right / num_trials
    z2 = NORMAL_95**2
    centre = (share + z2 / (2 * num_trials)) / (1 + z2 / num_trials)
    half = NORMAL_95 * sqrt(share * (1 - share) / num_trials + z2 / (4 * num_trials**2)) / (1 + z2 / num_trials)
    # At 0 and 1 the bound equals the share; rounding must not push it past.
    low, high = max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
    return Interval(mean=share, low=low, high=high, num_prompts=num_trials)


def _bootstrap_by_prompt(
    values: Sequence[float] | NDArray, prompts: Sequence[int] | NDArray, *, num_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean and 95 % interval where the values of one prompt are not independent of each other.

    Whole prompts are drawn with replacement; a prompt weighs the same however many seeds it has.

    Args:
        values: (n,), one per video; NaN means the measure does not apply to that video.
        prompts: (n,), the prompt each value belongs to.
        num_resamples: bootstrap resamples.
        seed: of the resampling.

    Returns:
        Mean over prompts of the mean over seeds, with the 2.5 % and 97.5 % percentiles. One prompt gives an
        interval that is not defined: ``low`` and ``high`` are NaN.

    Raises:
        ValueError: If the two sequences differ in length.

    Source: the percentile bootstrap over clusters (Davison and Hinkley, 1997, section 3.8).
    """
    values, prompts = np.asarray(values, dtype=np.float64), np.asarray(prompts)
    if values.shape != prompts.shape or values.ndim != 1:
        raise ValueError(
            f"values{values.shape} and prompts{prompts.shape} must be two lists of equal length: "
            "pass one prompt per value."
        )
    kept = ~np.isnan(values)
    if not kept.any():
        return Interval(mean=np.nan, low=np.nan, high=np.nan, num_prompts=0)
    _, owner = np.unique(prompts[kept], return_inverse=True)
    means = np.bincount(owner, weights=values[kept]) / np.bincount(owner)
    if len(means) == 1:
        return Interval(mean=float(means[0]), low=np.nan, high=np.nan, num_prompts=1)
    low, high = cluster_bootstrap(means[:, None], num_resamples=num_resamples, seed=seed)[:, 0]
    return Interval(mean=float(means.mean()), low=float(low), high=float(high), num_prompts=len(means))


def cluster_bootstrap(
    sums: NDArray, weights: NDArray | None = None, *, num_resamples: int, seed: int = 0
) -> NDArray[np.float64]:
    """95 % limits of many means at once, each over the same number of clusters, whole clusters redrawn.

    Args:
        sums: (clusters, measures), a cluster's weighted sum; its mean where all clusters weigh the same.
        weights: (clusters, measures), positive; None where all weigh the same.
        num_resamples: bootstrap resamples, the same for every measure.
        seed: of the resampling.

    Returns:
        (2, measures): 2.5 % and 97.5 % percentiles of sum(sums) / sum(weights). The same on any machine and with any
        number of threads: the terms are rounded to a grid so fine (1e-12 of the largest) that all sums are exact.

    Raises:
        ValueError: If there are fewer than two clusters or no resamples.

    Source: the percentile bootstrap over clusters (Davison and Hinkley, 1997, section 3.8).
    """
    num_clusters, num_measures = sums.shape
    if num_clusters < 2 or num_resamples < 1:
        raise ValueError(
            f"a bootstrap of {num_clusters} clusters with num_resamples={num_resamples} has no limits: "
            "use two or more clusters and one or more resamples."
        )
    counts = _draw_counts(num_clusters, num_resamples, seed)
    limits = np.empty((2, num_measures))
    for start in range(0, num_measures, _MEASURES_AT_ONCE):
        part = slice(start, start + _MEASURES_AT_ONCE)
        means = counts @ _on_grid(sums[:, part])
        means /= num_clusters if weights is None else counts @ _on_grid(weights[:, part])
        limits[:, part] = _percentiles(np.ascontiguousarray(means.T))
    return limits


_MEASURES_AT_ONCE = 64  # times 10,000 resamples: 5 MB, which a cache of the second level nearly holds


@lru_cache(maxsize=4)
def _draw_counts(num_clusters: int, num_resamples: int, seed: int) -> NDArray[np.float64]:
    """(resamples, clusters): how often each cluster was drawn."""
    draws = np.random.default_rng(seed).integers(0, num_clusters, size=(num_resamples, num_clusters))
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


def _paired_by_prompt(
    values: dict[tuple[int, int], float], baseline: dict[tuple[int, int], float], *, seed: int = 0
) -> Interval:
    """Mean difference ``values - baseline`` over the videos both have, with its interval clustered by prompt.

    Args:
        values: {(prompt index, seed index): measure}.
        baseline: the same for the policy compared against.
        seed: of the resampling.

    Returns:
        The interval of the differences; NaN differences are left out.
    """
    common = sorted(values.keys() & baseline.keys())
    differences = [values[key] - baseline[key] for key in common]
    return _bootstrap_by_prompt(differences, [key[0] for key in common], seed=seed)


def ratio_by_prompt(
    values: dict[tuple[int, int], float],
    reference: dict[tuple[int, int], float],
    *,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of ``values`` over mean of ``reference`` on the videos both have, with its interval clustered by prompt.

    A ratio of means, not a mean of ratios: a video whose reference is nearly zero does not decide it.

    Args:
        values: {(prompt index, seed index): measure}.
        reference: the same, for what counts as 1.
        num_resamples: bootstrap resamples of whole prompts.
        seed: of the resampling.

    Returns:
        NaN without videos or where the reference is zero.
    """
    pairs = {key: (values[key], reference[key]) for key in sorted(values.keys() & reference.keys())}
    by_prompt: dict[int, list[tuple[float, float]]] = {}
    for (prompt, _), pair in pairs.items():
        if not np.isnan(pair).any():
            by_prompt.setdefault(prompt, []).append(pair)
    means = np.array([np.mean(rows, axis=0) for rows in by_prompt.values()]).reshape(-1, 2)
    if not len(means) or means[:, 1].mean() == 0:
        return Interval(mean=np.nan, low=np.nan, high=np.nan, num_prompts=0)
    ratio = float(means[:, 0].mean() / means[:, 1].mean())
    if len(means) == 1:
        return Interval(mean=ratio, low=np.nan, high=np.nan, num_prompts=1)
    draws = np.random.default_rng(seed).integers(0, len(means), size=(num_resamples, len(means)))
    drawn = means[draws].mean(axis=1)
    low, high = np.nanpercentile(drawn[:, 0] / np.where(drawn[:, 1] > 0, drawn[:, 1], np.nan), [2.5, 97.5])
    return Interval(mean=ratio, low=float(low), high=float(high), num_prompts=len(means))
