"""Tables for a Markdown page: per moment what is left of every policy's videos, and what differs from the baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import isnan
from pathlib import Path
from statistics import mean
from typing import Any

from longtake.evaluation.comparison import compare_runs, value_at
from longtake.evaluation.intervals import ratio_by_prompt
from longtake.evaluation.metric import MetricSpec
from longtake.evaluation.paired import NUM_RESAMPLES
from longtake.evaluation.records import RunScores
from longtake.evaluation.report.data import COSTS, Estimate, Measure, ReportData
from longtake.evaluation.report.png import draw_curves

Levels = Mapping[str, Mapping[str, float]]
"""{reference: {metric: value}}: rows above the policies."""

JUDGE = "judge/"
SIX = ("shape", "colour", "background", "texture", "motion", "camera")
TITLES = {
    "judge/mean_of_six": "judge, mean of six",
    **{f"{JUDGE}{name}": name for name in SIX},
    "judge/one_object": "one object",
    "judge/background_psnr": "background PSNR",
    "judge/revisit_psnr": "revisit PSNR",
    "judge/motion_magnitude": "motion kept",
}
"""The judge's columns, which are the default where a run has them; others have their measure's title."""
SHARES = {"judge/motion_magnitude": "motion magnitude"}
"""Shown as a share of the same videos' first seconds; a difference is of the measure itself, under this title."""
FIRST_SECONDS = 5.0
PLAIN_COSTS = ("attention_density", "ms_per_block", "kv_mb")
"""Of a whole video, in the last columns, where a run has them."""


def default_columns(runs: Sequence[RunScores]) -> list[str]:
    """Metrics that stand in columns unless told otherwise: the judge's, else all VBench forms and flow.

    Raises:
        ValueError: If the runs have none of them.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.specs))
    judged = [name for name in TITLES if name in names]
    others = [name for name in names if name.startswith(("vbench", "proxy/flow_magnitude", "proxy/motion_kept"))]
    if not judged and not others:
        raise ValueError("these runs have no measure of the judge and none of VBench: name some with --metrics")
    return judged or others


def find_columns(runs: Sequence[RunScores], wanted: Sequence[str]) -> list[str]:
    """Full names of metrics; what stands in brackets may be left out.

    Raises:
        ValueError: If a run has no such metric.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.specs))
    found = []
    for word in wanted:
        fitting = [name for name in names if word in (name, name.partition("[")[0])]
        if not fitting:
            near = [name for name in names if word.rpartition("/")[2] in name] or names
            raise ValueError(f"no run has a metric {word!r}; near it: {', '.join(near[:8])}")
        found += fitting
    return found


def moment_tables(
    runs: Sequence[RunScores],
    *,
    baseline: str,
    moments: Sequence[float],
    columns: Sequence[str],
    levels: Levels | None = None,
) -> str:
    """Markdown: at each moment the level of every run that got so far, then paired differences to the baseline.

    Brackets are 95 % intervals. A difference is bold if its interval leaves out zero and the sign test over prompts,
    adjusted over the policies (Holm), is at most 0.05.

    Args:
        runs: Of the same prompts and seeds, in the order of the rows.
        baseline: Label of the run that the others are compared with.
        moments: Seconds; each stands for the five seconds of video that end there.
        columns: Full names of metrics.
        levels: Rows of reference.

    Raises:
        ValueError: If the runs cannot be compared, or none got to any moment.
    """
    chosen = [_only(run, columns) for run in runs]
    comparison = compare_runs(chosen, baseline=baseline, moments=moments)
    measures = [Measure(name=name, entry=comparison["metrics"][name]) for name in columns]
    parts = [f"Videos per policy: {', '.join(f'{run.label} {len(run.videos)}' for run in runs)}.\n"]
    for moment in moments:
        key = f"{moment:g}"
        reached = [run for run in chosen if _reaches(measures, run.label, key)]
        if not reached:
            continue
        parts.append(f"### At {key} s\n\n{_level_table(reached, measures, moment, levels or {})}")
        others = [run for run in reached if run.label != baseline]
        if others and len(others) < len(reached):
            text = f"Minus `{baseline}` on the same prompts and seeds:"
            parts.append(f"{text}\n\n{_difference_table(others, measures, key)}")
    if len(parts) == 1:
        raise ValueError(
            f"no video lasts until {', '.join(f'{moment:g}' for moment in moments)} s: give other moments"
        )
    return "\n".join(parts)


def write_curves(runs: Sequence[RunScores], path: Path, *, baseline: str, columns: Sequence[str]) -> None:
    """Draw the columns over time, a panel each, beside the tables.

    Args:
        runs: As for :func:`moment_tables`.
        path: PNG to write.
        baseline: Label of the run drawn in grey.
        columns: Full names of metrics; those without a curve are left out.

    Raises:
        ValueError: If matplotlib is not installed, or none has a curve.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("a PNG of curves needs matplotlib: pip install matplotlib")
    chosen = [_only(run, columns) for run in runs]
    comparison = compare_runs(chosen, baseline=baseline, moments=())
    path.parent.mkdir(parents=True, exist_ok=True)
    data = ReportData(runs=chosen, comparison=comparison)
    measured = [name for name in columns if name in data.measures]
    if not draw_curves(replace(data, headline=measured), path):
        raise ValueError(f"none of {', '.join(columns)} has a curve over time: name others with --metrics")


@dataclass(frozen=True)
class Section:
    """A part of a Markdown page between two comments, which a command writes anew.

    Attributes:
        name: In both comments.
    """

    name: str

    @property
    def begin(self) -> str:
        """The line above."""
        return f"<!-- {self.name}: written by longtake evaluate table -->"

    @property
    def end(self) -> str:
        """The line below."""
        return f"<!-- end of {self.name} -->"

    def replaced(self, page: str, text: str, *, what: str) -> str:
        """A page with a new text in the section.

        Args:
            page: The whole page.
            text: Markdown; ends with a line break.
            what: The page's name, for the error.

        Raises:
            ValueError: If the page does not have the two lines, once each and in order.
        """
        before, begin, rest = page.partition(self.begin)
        _, end, after = rest.partition(self.end)
        if not begin or not end or self.begin in rest or self.end in after:
            raise ValueError(
                f"{what} has no section {self.name!r}: add the lines {self.begin!r} and {self.end!r}, once"
            )
        return f"{before}{begin}\n{text}{end}{after}"


def _only(run: RunScores, columns: Sequence[str]) -> RunScores:
    """A run with some of its metrics; of what it has not, the reason stays."""
    specs: dict[str, MetricSpec] = {name: run.specs[name] for name in columns if name in run.specs}
    return RunScores(label=run.label, specs=specs, videos=run.videos, skipped=run.skipped, costs=run.costs)


def _reaches(measures: Sequence[Measure], label: str, moment: str) -> bool:
    return any(measure.level(label, moment).value is not None for measure in measures)


def _level_table(runs: Sequence[RunScores], measures: Sequence[Measure], moment: float, levels: Levels) -> str:
    costs = {name: COSTS[name] for name in PLAIN_COSTS if any(name in run.costs for run in runs)}
    titles = [TITLES.get(measure.name, measure.title) for measure in measures]
    lines = _head(("policy", "videos", *titles, *costs.values()))
    for name, values in levels.items():
        known = [_reference(values, measure.name) for measure in measures]
        lines.append(_line((f"_{name}_", "", *known, *("" for _ in costs))))
    for run in runs:
        estimates = [_level(run, measure, moment) for measure in measures]
        count = max(int(estimate.extra.get("num_videos", 0)) for estimate in estimates)
        prices = (_cost(run.costs.get(name)) for name in costs)
        lines.append(_line((run.label, str(count), *map(_cell, estimates), *prices)))
    return "\n".join(lines) + "\n"


def _difference_table(runs: Sequence[RunScores], measures: Sequence[Measure], moment: str) -> str:
    titles = [SHARES.get(measure.name, TITLES.get(measure.name, measure.title)) for measure in measures]
    lines = _head(("policy", "prompts", *titles))
    for run in runs:
        estimates = [measure.difference(run.label, moment) for measure in measures]
        count = max(int(estimate.extra.get("num_prompts", 0)) for estimate in estimates)
        lines.append(_line((run.label, str(count), *(_cell(estimate, signed=True) for estimate in estimates))))
    return "\n".join(lines) + "\n"


def _level(run: RunScores, measure: Measure, moment: float) -> Estimate:
    level = measure.level(run.label, f"{moment:g}")
    if measure.name not in SHARES or level.value is None:
        return level
    now, first = (_values_at(run, measure.name, seconds) for seconds in (moment, FIRST_SECONDS))
    share = ratio_by_prompt(now, first, num_resamples=NUM_RESAMPLES)
    if isnan(share.mean):
        return Estimate(value=None, extra=level.extra)
    limits = [None if isnan(limit) else limit for limit in (share.low, share.high)]
    return Estimate(value=share.mean, low=limits[0], high=limits[1], extra=level.extra)


def _values_at(run: RunScores, name: str, moment: float) -> dict[tuple[int, int], float]:
    lines = ((video.video, video.scores.get(name)) for video in run.videos)
    return {
        (line.prompt_index, line.seed_index): value_at(score, line.fps, moment)
        for line, score in lines
        if score is not None and score.windows and line.fps > 0
    }


def _reference(values: Mapping[str, float], name: str) -> str:
    six = [values[f"{JUDGE}{part}"] for part in SIX if f"{JUDGE}{part}" in values]
    if name == "judge/mean_of_six" and len(six) == len(SIX):
        return f"{mean(six):.2f}"
    return f"{values[name]:.2f}" if name in values and name not in SHARES else ""


def _cell(estimate: Estimate, *, signed: bool = False) -> str:
    """A number with its interval; two decimals, or one where it has two digits before the point or nearly so."""
    if estimate.value is None:
        return "-"
    ends = [end for end in (estimate.low, estimate.high) if end is not None]
    form = f"{'+' if signed else ''}.{1 if max(abs(value) for value in (estimate.value, *ends[1:])) >= 5 else 2}f"
    text = f"{estimate.value:{form}}"
    if len(ends) == 2:
        text += f" [{ends[0]:{form}}, {ends[1]:{form}}]"
    return f"**{text}**" if signed and estimate.is_significant else text


def _cost(value: Any) -> str:
    return "-" if value is None else f"{value:{',.0f' if value >= 100 else '.3g'}}"


def _head(titles: Sequence[str]) -> list[str]:
    return [_line(titles), "|" + "---|" * len(titles)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
