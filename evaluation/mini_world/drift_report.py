"""The drift study's report: curves per window, early and late means, paired differences; JSON, CSV, Markdown, PNG."""

import csv
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path

import numpy as np

from longtake.evaluation.intervals import Interval, bootstrap_by_prompt, paired_by_prompt
from longtake.evaluation.mini_world.drift import MEASURES
from longtake.evaluation.mini_world.drift_study import VideoResult, window_values
from longtake.evaluation.mini_world.judge import CLIP_SECONDS
from longtake.evaluation.report.colours import LIGHT

Levels = Mapping[str, Mapping[str, float]]
"""{reference: {measure: value}}, of :func:`longtake.evaluation.mini_world.drift_truth.truth_levels`."""

TITLES = {
    "shape": "shape right",
    "colour": "colour right",
    "background": "background colour right",
    "texture": "texture right",
    "motion": "motion kind right",
    "camera": "camera right",
    "one_object": "one and only one object",
    "background_psnr": "background PSNR to 0-5 s, dB",
    "revisit_psnr": "revisit PSNR, dB",
    "motion_magnitude": "motion magnitude, true = 1",
    "object_present": "object present",
}
MAX_BANDS = 5  # more bands than that hide each other
DASHES = ("-", "--", ":")


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Which windows count as early and as late, half-open ranges of window indices."""

    early: tuple[int, int]
    late: tuple[int, int]

    @classmethod
    def of(cls, num_windows: int) -> "Spans":
        """Windows 1-3 (5-20 s) against the last third; the first window is the reference and belongs to neither.

        Raises:
            ValueError: If there are fewer than 3 windows.
        """
        if num_windows < 3:
            raise ValueError(
                f"num_windows={num_windows} has no early and late part: use videos of 15 seconds or more."
            )
        late = max(2, num_windows - max(1, num_windows // 3))
        return cls(early=(1, min(4, late)), late=(late, num_windows))


def by_policy(results: Sequence[VideoResult]) -> dict[str, list[VideoResult]]:
    """Group results by policy label, in order of appearance."""
    grouped: dict[str, list[VideoResult]] = {}
    for result in results:
        grouped.setdefault(result.policy, []).append(result)
    return grouped


def curve(results: Sequence[VideoResult], measure: str) -> list[Interval]:
    """One interval per window, clustered by prompt, for one policy's results."""
    num_windows = max(len(result.windows) for result in results)
    intervals = []
    for window in range(num_windows):
        values = window_values(results, measure, window)
        intervals.append(bootstrap_by_prompt(list(values.values()), [prompt for prompt, _ in values]))
    return intervals


def span_values(results: Sequence[VideoResult], measure: str, span: tuple[int, int]) -> dict[tuple[int, int], float]:
    """Mean of a measure over a span of windows, per video; NaN where no window has it."""
    values = {}
    for result in results:
        row = np.array([window[measure] for window in result.windows[slice(*span)]])
        known = row[~np.isnan(row)]
        values[result.prompt_index, result.seed_index] = float(known.mean()) if len(known) else float("nan")
    return values


def summary(results: Sequence[VideoResult], *, baseline: str) -> dict[str, dict[str, dict[str, Interval]]]:
    """Early, late, late minus early, and late minus the baseline's late.

    Args:
        results: of any number of policies.
        baseline: label of the policy the others are compared with, on the same prompts and seeds.

    Returns:
        {policy: {measure: {"early", "late", "drift", "against": Interval}}}.

    Raises:
        ValueError: If the baseline has no results.
    """
    grouped = by_policy(results)
    if baseline not in grouped:
        raise ValueError(f"baseline={baseline!r} has no results: choose one of {', '.join(grouped) or 'none'}.")
    spans = Spans.of(max(len(result.windows) for result in results))
    table: dict[str, dict[str, dict[str, Interval]]] = {}
    for policy, own in grouped.items():
        table[policy] = {}
        for measure in MEASURES:
            early, late = (span_values(own, measure, span) for span in (spans.early, spans.late))
            other = span_values(grouped[baseline], measure, spans.late)
            prompts = [prompt for prompt, _ in late]
            table[policy][measure] = {
                "early": bootstrap_by_prompt(list(early.values()), prompts),
                "late": bootstrap_by_prompt(list(late.values()), prompts),
                "drift": paired_by_prompt(late, early),
                "against": paired_by_prompt(late, other),
            }
    return table


def cell(interval: Interval, *, signed: bool = False) -> str:
    """An interval as a table's cell; a signed one, a difference, is bold where it excludes zero."""
    if interval.num_prompts == 0:
        return "-"
    digits = 1 if max(abs(interval.mean), abs(interval.high)) >= 5 else 2
    sign = "+" if signed else ""
    mean = f"{interval.mean:{sign}.{digits}f}"
    if isnan(interval.low):
        return mean
    text = f"{mean} [{interval.low:{sign}.{digits}f}, {interval.high:{sign}.{digits}f}]"
    return f"**{text}**" if signed and interval.excludes_zero else text


def markdown_table(results: Sequence[VideoResult], *, baseline: str, levels: Levels) -> str:
    """The summary as Markdown, one row per measure and policy.

    Differences whose 95 % interval excludes zero are bold. Reference levels stand in rows of their own.
    """
    table = summary(results, baseline=baseline)
    spans = Spans.of(max(len(result.windows) for result in results))
    names = [f"{CLIP_SECONDS * first:g}-{CLIP_SECONDS * last:g} s" for first, last in (spans.early, spans.late)]
    lines = [
        f"| measure | policy | prompts | {names[0]} | {names[1]} | late - early | late - late of {baseline} |",
        "|---|---|---|---|---|---|---|",
    ]
    for measure in MEASURES:
        for name, values in levels.items():
            if measure in values:
                lines.append(f"| {TITLES[measure]} | _{name}_ | | {values[measure]:.2f} | {values[measure]:.2f} | | |")
        for policy, rows in table.items():
            row = rows[measure]
            against = "" if policy == baseline else cell(row["against"], signed=True)
            cells = [TITLES[measure], policy, str(row["late"].num_prompts), cell(row["early"]), cell(row["late"])]
            lines.append("| " + " | ".join([*cells, cell(row["drift"], signed=True), against]) + " |")
    return "\n".join(lines) + "\n"


def _plain(interval: Interval) -> dict[str, float | int | None]:
    return {
        key: None if isinstance(value, float) and isnan(value) else value for key, value in asdict(interval).items()
    }


def write_json(results: Sequence[VideoResult], path: Path, *, baseline: str, notes: Mapping[str, str]) -> None:
    """Write curves and summary as JSON, NaN as null, with notes on how they were made."""
    grouped = by_policy(results)
    document = {
        "notes": dict(notes),
        "num_videos": {policy: len(own) for policy, own in grouped.items()},
        "fingerprints": {policy: own[0].fingerprint for policy, own in grouped.items()},
        "curves": {
            policy: {measure: [_plain(point) for point in curve(own, measure)] for measure in MEASURES}
            for policy, own in grouped.items()
        },
        "summary": {
            policy: {measure: {key: _plain(value) for key, value in row.items()} for measure, row in rows.items()}
            for policy, rows in summary(results, baseline=baseline).items()
        },
    }
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


def write_csv(results: Sequence[VideoResult], path: Path) -> None:
    """Write the curves: policy, measure, window start and end in seconds, mean, low, high, prompts."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["policy", "measure", "start", "end", "mean", "low", "high", "num_prompts"])
        for policy, own in by_policy(results).items():
            for measure in MEASURES:
                for window, point in enumerate(curve(own, measure)):
                    if point.num_prompts:
                        start = CLIP_SECONDS * window
                        values = [f"{value:.4f}" for value in (point.mean, point.low, point.high)]
                        writer.writerow([policy, measure, start, start + CLIP_SECONDS, *values, point.num_prompts])


def draw_curves(results: Sequence[VideoResult], path: Path, *, levels: Levels, title: str) -> None:
    """Draw every measure over time, one line per policy, with 95 % bands as long as they can be told apart.

    Args:
        results: of any number of policies.
        path: PNG to write.
        levels: drawn as dotted lines.
        title: above the figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 10), layout="constrained")
    FigureCanvasAgg(figure)
    grouped = by_policy(results)
    axes = figure.subplots(3, 4).flatten()
    for axis, measure in zip(axes, MEASURES, strict=False):
        for index, (policy, own) in enumerate(grouped.items()):
            points = curve(own, measure)
            colour, dashes = LIGHT[index % len(LIGHT)], DASHES[index // len(LIGHT) % len(DASHES)]
            middle = CLIP_SECONDS * (np.arange(len(points)) + 0.5)
            axis.plot(middle, [point.mean for point in points], color=colour, linestyle=dashes, label=policy)
            if len(grouped) <= MAX_BANDS:
                low, high = ([getattr(point, side) for point in points] for side in ("low", "high"))
                axis.fill_between(middle, low, high, color=colour, alpha=0.15, linewidth=0)
        for (name, values), style in zip(levels.items(), (":", "--"), strict=False):
            if measure in values:
                axis.axhline(values[measure], color="grey", linestyle=style, linewidth=1, label=name)
        axis.set_title(TITLES[measure], fontsize=10)
        axis.grid(alpha=0.3)
        if not measure.endswith("_psnr"):
            axis.set_ylim(0.0, 1.05 if measure != "motion_magnitude" else None)
    for axis in axes[len(MEASURES) :]:
        axis.axis("off")
    handles, labels = axes[MEASURES.index("background_psnr")].get_legend_handles_labels()
    columns = 1 if len(labels) <= MAX_BANDS + 2 else 2
    axes[-1].legend(handles, labels, loc="center", title="cache policy", fontsize=8, ncols=columns)
    figure.supxlabel("seconds of video")
    figure.suptitle("\n".join(textwrap.wrap(title, 140)), fontsize=10)
    figure.savefig(path, dpi=100)
