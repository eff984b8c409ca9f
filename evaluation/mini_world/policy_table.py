"""The table of cache policies: what is left of a video at some moments, and what it costs; levels and differences."""

from collections.abc import Mapping, Sequence
from math import isnan

import numpy as np

from longtake.evaluation.intervals import Interval, bootstrap_by_prompt, paired_by_prompt, ratio_by_prompt
from longtake.evaluation.mini_world.drift import ACCURACIES
from longtake.evaluation.mini_world.drift_report import Levels, by_policy, cell
from longtake.evaluation.mini_world.drift_study import VideoResult, window_values
from longtake.evaluation.mini_world.judge import CLIP_SECONDS

JUDGE = "judge"
COLUMNS = {
    JUDGE: "judge, mean of six",
    **{name: name for name in ACCURACIES},
    "one_object": "one object",
    "background_psnr": "background PSNR",
    "revisit_psnr": "revisit PSNR",
    "motion_kept": "motion kept",
    "ms_per_block": "ms per block",
    "kv_mb": "KV MB",
}
PLAIN = ("ms_per_block", "kv_mb")
Values = dict[tuple[int, int], float]


def values_at(results: Sequence[VideoResult], column: str, window: int) -> Values:
    """{(prompt index, seed index): value} of a column in one window, for one policy's results.

    ``judge`` is the mean of the six accuracies, ``motion_kept`` the motion magnitude.
    """
    if column == JUDGE:
        rows = [window_values(results, name, window) for name in ACCURACIES]
        return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    return window_values(results, "motion_magnitude" if column == "motion_kept" else column, window)


def level(results: Sequence[VideoResult], column: str, window: int) -> Interval:
    """Mean of a column in one window; motion kept is relative to the first window's motion."""
    values = values_at(results, column, window)
    if column == "motion_kept":
        return ratio_by_prompt(values, values_at(results, column, 0))
    return bootstrap_by_prompt(list(values.values()), [prompt for prompt, _ in values])


def difference(results: Sequence[VideoResult], other: Sequence[VideoResult], column: str, window: int) -> Interval:
    """Difference to another policy on the videos that both have; for motion, of the magnitude (true scene = 1)."""
    return paired_by_prompt(values_at(results, column, window), values_at(other, column, window))


def window_of(seconds: float) -> int:
    """Index of the five-second window that ends at a moment.

    Raises:
        ValueError: If no window ends there.
    """
    windows = seconds / CLIP_SECONDS
    if windows < 1 or windows != int(windows):
        raise ValueError(f"no window ends at {seconds:g} s: use a multiple of {CLIP_SECONDS:g}.")
    return int(windows) - 1


def policy_tables(
    results: Sequence[VideoResult], *, moments: Sequence[float], baseline: str, levels: Levels | None = None
) -> str:
    """Markdown: for each moment the level of every policy, then paired differences to the baseline.

    Args:
        results: of any number of policies.
        moments: seconds of video; each stands for the five seconds that end there.
        baseline: label of the policy that the others are compared with.
        levels: rows of reference, above the policies.

    Raises:
        ValueError: If the baseline has no results, or no window ends at a moment.
    """
    grouped = by_policy(results)
    if baseline not in grouped:
        raise ValueError(f"baseline={baseline!r} has no results: choose one of {', '.join(grouped) or 'none'}.")
    parts = []
    for moment in moments:
        window = window_of(moment)
        reached = {name: own for name, own in grouped.items() if any(window < len(row.windows) for row in own)}
        if not reached:
            continue
        parts.append(f"### At {moment:g} s\n\n{_levels(reached, window, levels or {})}")
        if baseline in reached and len(reached) > 1:
            parts.append(f"Minus `{baseline}` on the same prompts and seeds:\n\n{_against(reached, window, baseline)}")
    return "\n".join(parts)


def _levels(grouped: Mapping[str, Sequence[VideoResult]], window: int, levels: Levels) -> str:
    lines = _head(("policy", "videos", *COLUMNS.values()))
    for name, values in levels.items():
        known = [f"{values[column]:.2f}" if column in values else "" for column in COLUMNS]
        lines.append(_line((f"_{name}_", "", *known)))
    for policy, own in grouped.items():
        count = sum(window < len(row.windows) for row in own)
        cells = [_cell(level(own, column, window), column) for column in COLUMNS]
        lines.append(_line((policy, str(count), *cells)))
    return "\n".join(lines) + "\n"


def _against(grouped: Mapping[str, Sequence[VideoResult]], window: int, baseline: str) -> str:
    columns = [column for column in COLUMNS if column not in PLAIN]
    titles = ["motion magnitude" if column == "motion_kept" else COLUMNS[column] for column in columns]
    lines = _head(("policy", "prompts", *titles))
    for policy, own in grouped.items():
        if policy != baseline:
            rows = [difference(own, grouped[baseline], column, window) for column in columns]
            lines.append(_line((policy, str(rows[0].num_prompts), *(cell(row, signed=True) for row in rows))))
    return "\n".join(lines) + "\n"


def _cell(interval: Interval, column: str) -> str:
    if column in PLAIN:
        return "-" if isnan(interval.mean) else f"{interval.mean:{',.0f' if interval.mean >= 100 else '.3g'}}"
    return cell(interval)


def _head(titles: Sequence[str]) -> list[str]:
    return [_line(titles), "|" + "---|" * len(titles)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
