"""Runs of the same prompts and seeds side by side: means, paired differences, curves, moments, total scores."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isnan, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtake.evaluation.intervals import NUM_RESAMPLES, Interval, Paired, column_intervals, column_pairs, holm
from longtake.evaluation.metric import MetricSpec, Score
from longtake.evaluation.records import RunScores, VideoScores
from longtake.evaluation.scores import TOTALS

SCHEMA = 1
LEVEL = 0.05
REACH_SECONDS = 1.0  # a video counts at a moment if it ends no earlier than this before it: rollouts are whole blocks
_MOMENT_SECONDS = 5.0  # a moment stands for the seconds before it
_SLACK_SECONDS = 0.1
"""Windows are whole frames: at 23.976 frames a second, two seconds are 48 frames and end a little late."""
_CURVE_RESAMPLES = 2_000
"""Bands of curves are to look at, and there are thousands of points: a fifth of the resamples is enough."""
_ALWAYS = ("quality7", "quality6_long", "total")
"""Scores that are there if only with the reason why they have no value; the others where they have one."""
_NO_INTERVAL = {"reason": "an interval needs two prompts"}

_Key = tuple[int, int]  # (prompt index, seed index): the rows of every matrix are those of all runs, in order
_Curve = tuple[NDArray, NDArray, NDArray]
"""Starts (windows,), ends (windows,) and values (videos, windows) of one measure."""


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """One run's numbers, scaled as the specs say: (videos, names); moments {moment: (videos, names)}."""

    values: NDArray
    weights: NDArray
    at: Mapping[str, NDArray]
    curves: Sequence[_Curve]


def compare_runs(
    runs: Sequence[RunScores],
    *,
    baseline: str,
    moments: Sequence[float] = (5.0, 30.0, 60.0),
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, Any]:
    """Compare runs with one of them, pair by pair.

    Args:
        runs: Of the same prompts and seeds; what only some of them have is compared where both have it.
        baseline: Label of the run that the others are compared with.
        moments: Seconds; each stands for the mean of the windows that lie inside the five seconds that end there.
        num_resamples: Bootstrap resamples of whole prompts; curves take no more than 2,000.

    Returns:
        Values that JSON holds, never NaN: ``schema``, ``baseline``, ``labels``, ``moments``, ``metrics`` and
        ``scores`` (VBench's totals, each a value or a reason). ``metrics[name]`` has ``spec``, ``runs``, ``paired``,
        ``curves`` and ``at``; a cell is a mean or a difference with its interval, or ``{"skipped": why}``. A
        difference is ``significant`` if the sign test over prompts, adjusted over the runs compared (Holm), is at
        most 0.05 and the interval leaves out zero.

    Raises:
        ValueError: If there is no run, a label is repeated, the baseline is unknown, a moment is not above 0, or
            runs disagree about what a prompt or seed index means.
    """
    _check(runs, baseline, moments)
    specs = {name: spec for run in reversed(runs) for name, spec in run.specs.items()}
    names = list(dict.fromkeys(name for run in runs for name in run.specs))
    keys = sorted({_key(video) for run in runs for video in run.videos})
    rows, prompts = {key: row for row, key in enumerate(keys)}, np.array([prompt for prompt, _ in keys], dtype=int)
    measured = {run.label: _measure(run, [specs[name] for name in names], rows, moments) for run in runs}

    def compared(pick: Callable[[_Measured], tuple[NDArray, NDArray | None]]) -> dict[str, dict[str, Any]]:
        picked = {label: pick(own) for label, own in measured.items()}
        return _compare(runs, names, picked, prompts, baseline=baseline, num_resamples=num_resamples)

    whole = compared(lambda own: (own.values, own.weights))
    at = {f"{moment:g}": compared(lambda own, key=f"{moment:g}": (own.at[key], None)) for moment in moments}
    curves = {label: _curves(own, names, prompts, num_resamples) for label, own in measured.items()}
    return {
        "schema": SCHEMA,
        "baseline": baseline,
        "labels": [run.label for run in runs],
        "moments": [float(moment) for moment in moments],
        "metrics": {
            name: {
                "spec": {**asdict(specs[name]), "comparable_to_published": specs[name].comparable_to_published},
                **whole[name],
                "curves": {label: own[name] for label, own in curves.items() if own[name]},
                "at": {key: table[name] for key, table in at.items()},
            }
            for name in names
        },
        "scores": {run.label: _totals(whole, run.label) for run in runs},
    }


def _check(runs: Sequence[RunScores], baseline: str, moments: Sequence[float]) -> None:
    labels = [run.label for run in runs]
    if not runs:
        raise ValueError("there is no run to compare: give one or more.")
    if repeated := [label for label, count in Counter(labels).items() if count > 1]:
        raise ValueError(f"two runs are called {repeated[0]!r}: give them labels of their own.")
    if baseline not in labels:
        raise ValueError(f"baseline={baseline!r} is none of the runs {', '.join(labels)}: name one of them.")
    if bad := [moment for moment in moments if not moment > 0]:
        raise ValueError(f"moments={list(moments)} holds {bad[0]:g}: moments are seconds above 0.")
    known: dict[_Key, tuple[str, str, int]] = {}
    for run in runs:
        keys = [_key(video) for video in run.videos]
        if repeated := [key for key, count in Counter(keys).items() if count > 1]:
            raise ValueError(f"run {run.label!r} has prompt and seed {repeated[0]} twice: every video needs its own.")
        for key, video in zip(keys, run.videos, strict=True):
            label, prompt, seed = known.setdefault(key, (run.label, video.video.prompt, video.video.seed))
            if prompt and video.video.prompt and prompt != video.video.prompt:
                raise ValueError(
                    f"prompt {key[0]} is {prompt[:60]!r} in run {label!r} and {video.video.prompt[:60]!r} in "
                    f"{run.label!r}: compare runs of one list of prompts."
                )
            if seed != video.video.seed:
                raise ValueError(
                    f"prompt {key[0]}, sample {key[1]} has seed {seed} in run {label!r} and {video.video.seed} in "
                    f"{run.label!r}: paired differences need the same seeds."
                )


def _key(video: VideoScores) -> _Key:
    return video.video.prompt_index, video.video.seed_index


def _measure(
    run: RunScores, specs: Sequence[MetricSpec], rows: Mapping[_Key, int], moments: Sequence[float]
) -> _Measured:
    shape = (len(rows), len(specs))
    values, weights, at = np.full(shape, nan), np.ones(shape), np.full((len(moments), *shape), nan)
    curves = []
    for column, spec in enumerate(specs):
        pieces = []
        for video in run.videos:
            score = video.scores.get(spec.name)
            if score is None or score.value is None:
                continue
            row = rows[_key(video)]
            values[row, column], weights[row, column] = score.value, score.weight
            if score.windows and video.video.fps > 0:
                piece = _window_arrays(score, video.video.fps)
                pieces.append((row, *piece))
                at[:, row, column] = [_mean_at(*piece, moment) for moment in moments]
        curves.append(_join(pieces, len(rows), spec.scale))
    scales = np.array([spec.scale for spec in specs])
    values[~(weights > 0)] = nan
    scaled = {f"{moment:g}": part * scales for moment, part in zip(moments, at, strict=True)}
    return _Measured(values=values * scales, weights=weights, at=scaled, curves=curves)


def value_at(score: Score, fps: float, moment: float) -> float:
    """A video's value at a moment, unscaled: the mean of the windows inside the five seconds that end there.

    NaN where the video is shorter, or no window with a value lies there.
    """
    return _mean_at(*_window_arrays(score, fps), moment)


def _window_arrays(score: Score, fps: float) -> tuple[NDArray, NDArray, NDArray]:
    starts = np.array([window.start_frame for window in score.windows])
    lengths = np.array([window.num_frames for window in score.windows])
    values = np.array([window.value for window in score.windows], dtype=np.float64)  # None becomes NaN
    return np.round(starts / fps, 3), np.round((starts + lengths) / fps, 3), values


def _mean_at(starts: NDArray, ends: NDArray, values: NDArray, moment: float) -> float:
    if ends[-1] < moment - REACH_SECONDS:
        return nan
    inside = (
        (starts >= moment - _MOMENT_SECONDS - _SLACK_SECONDS) & (ends <= moment + _SLACK_SECONDS) & ~np.isnan(values)
    )
    return float(values[inside].mean()) if inside.any() else nan


def _join(pieces: Sequence[tuple[int, NDArray, NDArray, NDArray]], num_rows: int, scale: float) -> _Curve:
    """Videos' curves side by side; windows that start together are one, even where the last is a little longer."""
    starts = np.unique(np.concatenate([piece[1] for piece in pieces])) if pieces else np.zeros(0)
    ends, values = np.zeros(len(starts)), np.full((num_rows, len(starts)), nan)
    for row, own_starts, own_ends, own_values in pieces:
        columns = np.searchsorted(starts, own_starts)
        ends[columns] = np.maximum(ends[columns], own_ends)
        values[row, columns] = own_values * scale
    return starts, ends, values


def _compare(
    runs: Sequence[RunScores],
    names: Sequence[str],
    measured: Mapping[str, tuple[NDArray, NDArray | None]],
    prompts: NDArray,
    *,
    baseline: str,
    num_resamples: int,
) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {name: {"runs": {}, "paired": {}} for name in names}
    pairs: dict[str, list[Paired]] = {}
    for run in runs:
        values, weights = measured[run.label]
        intervals = column_intervals(values, prompts, weights, num_resamples=num_resamples)
        counts = (~np.isnan(values)).sum(axis=0).tolist()
        for name, interval, count in zip(names, intervals, counts, strict=True):
            reason = _why_missing(run, name) if count == 0 else ""
            table[name]["runs"][run.label] = {"skipped": reason} if reason else _cell(interval, count)
        if run.label != baseline:
            pairs[run.label] = column_pairs(values, measured[baseline][0], prompts, num_resamples=num_resamples)
    for column, name in enumerate(names):
        own = {label: columns[column] for label, columns in pairs.items()}
        adjusted = holm({label: pair.sign_p for label, pair in own.items()})
        table[name]["paired"] = {label: _pair_cell(own[label], adjusted[label], baseline) for label in own}
    return table


def _why_missing(run: RunScores, name: str) -> str:
    if name not in run.specs:
        return run.skipped.get(name, "not measured in this run")
    scores = [video.scores[name] for video in run.videos if name in video.scores]
    if not scores:
        return run.skipped.get(name, "no video of this run was measured")
    reasons = Counter(score.skipped for score in scores if score.skipped is not None)
    if reasons:
        return reasons.most_common(1)[0][0]
    if not any(score.windows for score in scores):
        return "has no curve over time"
    return f"no video has a window inside the {_MOMENT_SECONDS:g} s before this moment"


def _cell(interval: Interval, num_videos: int) -> dict[str, Any]:
    cell = {name: _number(value) for name, value in vars(interval).items()} | {"num_videos": num_videos}
    return cell if interval.num_prompts > 1 else cell | _NO_INTERVAL


def _pair_cell(pair: Paired, holm_p: float, baseline: str) -> dict[str, Any]:
    if not pair.num_pairs:
        return {"skipped": f"no prompt and seed at which both this run and {baseline} have a value"}
    cell = {name: _number(value) for name, value in vars(pair).items()} | {"holm_p": _number(holm_p)}
    cell["significant"] = bool(holm_p <= LEVEL and pair.excludes_zero)
    return cell if pair.num_prompts > 1 else cell | _NO_INTERVAL


def _number(value: float) -> float | None:
    return None if isnan(value) else value


def _curves(
    measured: _Measured, names: Sequence[str], prompts: NDArray, num_resamples: int
) -> dict[str, list[dict[str, Any]]]:
    """{metric: windows with their mean and band}, all of a run in one bootstrap."""
    values = np.concatenate([values for _, _, values in measured.curves], axis=1) if names else np.zeros((0, 0))
    intervals = iter(column_intervals(values, prompts, num_resamples=min(num_resamples, _CURVE_RESAMPLES)))
    counts = iter((~np.isnan(values)).sum(axis=0).tolist())
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for name, (starts, ends, _) in zip(names, measured.curves, strict=True):
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            interval = next(intervals)
            band = {key: _number(getattr(interval, key)) for key in ("mean", "low", "high")}
            rows[name].append({"start_s": start, "end_s": end, **band, "num_videos": next(counts)})
    return rows


def _totals(table: Mapping[str, Mapping[str, Any]], label: str) -> dict[str, dict[str, Any]]:
    means = {name: cells["runs"][label]["mean"] for name, cells in table.items() if "mean" in cells["runs"][label]}
    totals = {}
    for name, compute in TOTALS.items():
        value, reason = compute(means)
        if name in _ALWAYS or value is not None:
            totals[name] = {"value": value, "reason": reason}
    return totals
