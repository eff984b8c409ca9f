"""Tables of an evaluation outside its page: CSV files, a short table for the terminal, and Markdown."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import isnan
from pathlib import Path
from statistics import mean
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from longtake.evaluation.comparison import compare_runs, value_at
from longtake.evaluation.intervals import NUM_RESAMPLES, ratio_by_prompt
from longtake.evaluation.records import RunScores, write_atomically
from longtake.evaluation.report.data import (
    COSTS,
    VERDICTS,
    Estimate,
    Measure,
    ReportData,
    digits_for,
    finite,
    interval,
    number,
)
from longtake.evaluation.report.figures import draw_curves_png

_LEVELS = ("mean", "low", "high", "num_videos", "num_prompts")
_PAIRED = (
    *("difference", "low", "high", "num_pairs", "num_prompts", "sign_p", "holm_p", "significant"),
    "minimum_detectable",
)
_BOTH = ("metric", "policy", "moment_s", *_LEVELS, "not_measured_because", *(f"baseline_{name}" for name in _PAIRED))
_COLUMNS = {
    "summary.csv": _BOTH,
    "moments.csv": _BOTH,
    "curves.csv": ("metric", "policy", "start_s", "end_s", "mean", "low", "high", "num_videos"),
    "videos.csv": ("metric", "policy", "video", "prompt_index", "seed_index", "value", "not_measured_because"),
    "costs.csv": ("policy", "cost", "value"),
    "flags.csv": ("policy", "video", "prompt", "kind", "start_s", "end_s", "message"),
    "skipped.csv": ("metric", "why", "policies"),
}


def write_csv_files(data: ReportData, folder: Path) -> list[Path]:
    """Write summary, moments, curves, videos, costs, flags and reasons for missing numbers; the folder is created."""
    tables: dict[str, Iterable[Sequence[Any]]] = {
        "summary.csv": _level_rows(data, None),
        "moments.csv": (row for moment in data.moments for row in _level_rows(data, moment)),
        "curves.csv": _curve_rows(data),
        "videos.csv": _video_rows(data),
        "costs.csv": ((run.label, *cost) for run in data.runs for cost in run.costs.items() if cost[0] in data.costs),
        "flags.csv": data.flags,
        "skipped.csv": ((name, why, " ".join(labels)) for (name, why), labels in data.skipped.items()),
    }
    return [_write_csv(folder / name, _COLUMNS[name], rows) for name, rows in tables.items()]


def _write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([_plain(cell) for cell in row] for row in rows)
    write_atomically(path, text.getvalue())
    return path


def _plain(cell: Any) -> Any:
    """A cell without NaN that no spreadsheet takes for a formula."""
    if isinstance(cell, float):
        return "" if finite(cell) is None else f"{cell:.10g}"
    if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{cell}"
    return "" if cell is None else cell


def _level_rows(data: ReportData, moment: str | None) -> Iterable[Sequence[Any]]:
    for measure in data.measures.values():
        if moment is not None and moment not in measure.moments:
            continue
        for label in data.labels:
            level, difference = measure.level(label, moment), measure.difference(label, moment).extra
            numbers = [level.extra.get(name) for name in _LEVELS]
            paired = [difference.get(name) if label != data.baseline else None for name in _PAIRED]
            yield [measure.name, label, moment, *numbers, level.reason, *paired]


def _curve_rows(data: ReportData) -> Iterable[Sequence[Any]]:
    for measure in data.measures.values():
        for label in data.labels:
            for point in measure.curve(label):
                yield [measure.name, label, *(point.get(name) for name in _COLUMNS["curves.csv"][2:])]


def _video_rows(data: ReportData) -> Iterable[Sequence[Any]]:
    for run in data.runs:
        for video in run.videos:
            keys = (run.label, video.video.id, video.video.prompt_index, video.video.seed_index)
            yield from ([name, *keys, score.value, score.skipped] for name, score in sorted(video.scores.items()))


_MOST_COLUMNS = 3
_MOST_MEASURES = 5  # policies, or measures, that stand side by side in a terminal of 80 columns


def summary_table(comparison: Mapping[str, Any]) -> Table:
    """The first table of the report for the terminal, with a sign where a difference to the baseline is significant.

    Few policies stand in columns with their intervals; many in rows without, and with the first measures only.
    """
    data = ReportData(runs=(), comparison=comparison)
    are_columns = len(data.labels) <= _MOST_COLUMNS
    measures = data.headlines if are_columns else data.headlines[:_MOST_MEASURES]
    heads = [Text(label, style="bold" if label == data.baseline else "") for label in data.labels]
    names = [Text.assemble(item.title, (f" {item.family}/", "dim")) for item in measures]
    rows = [_terminal_row(data, item, with_interval=are_columns) for item in measures]
    signs = f"; \u25b2 \u25bc \u25c6 significant against {data.baseline}" if data.others else ""
    caption = f"means{' and 95 % intervals' if are_columns else ''}{signs}"
    table = Table(caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("measure" if are_columns else "policy", no_wrap=not are_columns)
    for head in heads if are_columns else names:
        table.add_column(head, justify="right", overflow="fold")
    lines = zip(names, rows, strict=True) if are_columns else zip(heads, zip(*rows, strict=True), strict=True)
    for head, cells in lines:
        table.add_row(head, *cells)
    return table


def _terminal_row(data: ReportData, measure: Measure, *, with_interval: bool) -> list[Text]:
    digits = digits_for(measure.level(label) for label in data.labels)
    styles = {"up": "green", "down": "red"}
    cells = []
    for label in data.labels:
        level = measure.level(label)
        verdict = measure.verdict(label) if label != data.baseline else ""
        text = number(level.value, digits) + (VERDICTS[verdict][0] or " ")
        cell = Text("-", style="dim") if level.value is None else Text(text, style=styles.get(verdict, ""))
        if with_interval and level.low is not None:
            cell.append(f"\n{interval(level, digits)} ", style="dim")
        cells.append(cell)
    return cells


Levels = Mapping[str, Mapping[str, float]]  # {reference: {metric: value}}: rows above the policies

JUDGE = "judge/"
_SIX = ("shape", "colour", "background", "texture", "motion", "camera")
TITLES = {
    "judge/mean_of_six": "judge, mean of six",
    **{f"{JUDGE}{name}": name for name in _SIX},
    "judge/one_object": "one object",
    "judge/background_psnr": "background PSNR",
    "judge/revisit_psnr": "revisit PSNR",
    "judge/motion_magnitude": "motion kept",
}
"""The judge's columns, which are the default where a run has them; others have their measure's title."""
_SHARES = {"judge/motion_magnitude": "motion magnitude"}
"""Shown as a share of the same videos' first seconds; a difference is one of the measure itself, under this title."""
_FIRST_SECONDS = 5.0
_PLAIN_COSTS = ("attention_density", "ms_per_block", "kv_mb")  # costs in the last columns, where a run has them


def choose_columns(runs: Sequence[RunScores], wanted: Sequence[str] | None) -> list[str]:
    """Full names of metrics, whose brackets may be left out; by default the judge's, else VBench's and flow."""
    names = list(dict.fromkeys(name for run in runs for name in run.specs))
    if wanted is None:
        judged = [name for name in TITLES if name in names]
        others = [name for name in names if name.startswith(("vbench", "proxy/flow_magnitude", "proxy/motion_kept"))]
        if not judged and not others:
            raise ValueError("these runs have no measure of the judge and none of VBench: name some with --metrics")
        return judged or others
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
    adjusted over the policies (Holm), is at most 0.05. ``levels`` are rows of reference above the runs.
    """
    chosen = _restricted(runs, columns)
    comparison = compare_runs(chosen, baseline=baseline, moments=moments)
    measures = [Measure(name, comparison["metrics"][name]) for name in columns]
    parts = [f"Videos per policy: {', '.join(f'{run.label} {len(run.videos)}' for run in runs)}.\n"]
    for moment in moments:
        key = f"{moment:g}"
        reached = [run for run in chosen if any(item.level(run.label, key).value is not None for item in measures)]
        if not reached:
            continue
        parts.append(f"### At {key} s\n\n{_level_table(reached, measures, moment, levels or {})}")
        others = [run for run in reached if run.label != baseline]
        if others and len(others) < len(reached):
            text = f"Minus `{baseline}` on the same prompts and seeds:"
            parts.append(f"{text}\n\n{_difference_table(others, measures, key)}")
    if len(parts) == 1:
        times = ", ".join(f"{moment:g}" for moment in moments)
        raise ValueError(f"no video lasts until {times} s: give other moments")
    return "\n".join(parts)


def write_curves(runs: Sequence[RunScores], path: Path, *, baseline: str, columns: Sequence[str]) -> None:
    """Draw the columns over time as a PNG with a panel each; the baseline is grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    comparison = compare_runs(_restricted(runs, columns), baseline=baseline, moments=())
    data = ReportData(runs=runs, comparison=comparison)
    measured = [name for name in columns if name in data.measures]
    if draw_curves_png(replace(data, headline=measured), path) is None:
        raise ValueError(f"none of {', '.join(columns)} has a curve over time: name others with --metrics")


def replace_section(page: Path, section: str, text: str | None) -> None:
    """Write Markdown that ends with a line break into a section of a page; None only checks that there is one."""
    first, last = f"<!-- {section}: written by longtake evaluate table -->", f"<!-- end of {section} -->"
    before, begin, rest = page.read_text(encoding="utf-8").partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end or first in rest or last in after:
        raise ValueError(f"{page} has no section {section!r}: add the lines {first!r} and {last!r}, once")
    if text is not None:
        page.write_text(f"{before}{first}\n{text}{last}{after}", encoding="utf-8")


def _restricted(runs: Sequence[RunScores], columns: Sequence[str]) -> list[RunScores]:
    return [replace(run, specs={name: run.specs[name] for name in columns if name in run.specs}) for run in runs]


def _level_table(runs: Sequence[RunScores], measures: Sequence[Measure], moment: float, levels: Levels) -> str:
    costs = {name: COSTS[name] for name in _PLAIN_COSTS if any(name in run.costs for run in runs)}
    titles = [TITLES.get(measure.name, measure.title) for measure in measures]
    rows = []
    for name, values in levels.items():
        known = [_reference(values, measure.name) for measure in measures]
        rows.append([f"_{name}_", "", *known, *("" for _ in costs)])
    for run in runs:
        estimates = [_level(run, measure, moment) for measure in measures]
        count = max(int(estimate.extra.get("num_videos", 0)) for estimate in estimates)
        prices = [_cost(run.costs.get(name)) for name in costs]
        rows.append([run.label, str(count), *map(_cell, estimates), *prices])
    return _markdown(["policy", "videos", *titles, *costs.values()], rows)


def _difference_table(runs: Sequence[RunScores], measures: Sequence[Measure], moment: str) -> str:
    titles = [_SHARES.get(measure.name, TITLES.get(measure.name, measure.title)) for measure in measures]
    rows = []
    for run in runs:
        estimates = [measure.difference(run.label, moment) for measure in measures]
        count = max(int(estimate.extra.get("num_prompts", 0)) for estimate in estimates)
        rows.append([run.label, str(count), *(_cell(estimate, signed=True) for estimate in estimates)])
    return _markdown(["policy", "prompts", *titles], rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |\n" for cells in (head, *rows)]
    return "".join([lines[0], "|" + "---|" * len(head) + "\n", *lines[1:]])


def _level(run: RunScores, measure: Measure, moment: float) -> Estimate:
    level = measure.level(run.label, f"{moment:g}")
    if measure.name not in _SHARES or level.value is None:
        return level
    now, first = (_values_at(run, measure.name, seconds) for seconds in (moment, _FIRST_SECONDS))
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
    six = [values[f"{JUDGE}{part}"] for part in _SIX if f"{JUDGE}{part}" in values]
    if name == "judge/mean_of_six" and len(six) == len(_SIX):
        return f"{mean(six):.2f}"
    return f"{values[name]:.2f}" if name in values and name not in _SHARES else ""


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
