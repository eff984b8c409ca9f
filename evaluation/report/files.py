"""The numbers behind a report as CSV files for spreadsheets."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from longtake.evaluation.records import write_atomically
from longtake.evaluation.report.data import Estimate, Measure, ReportData, finite

FlagRow = tuple[str, str, str, str, float, float, str]
"""(label, video id, prompt, kind, start in seconds, end in seconds, message)."""

LEVELS = ("mean", "low", "high", "num_videos", "num_prompts")
PAIRED = ("difference", "low", "high", "num_pairs", "num_prompts", "sign_p", "holm_p", "significant")
DETECTABLE = "minimum_detectable"


def write_files(data: ReportData, folder: Path, *, flags: Sequence[FlagRow]) -> list[Path]:
    """Write every table of the report: summary, moments, curves, videos, costs, flags and what is missing.

    Args:
        data: Of the report.
        folder: Made if it is not there.
        flags: Of the videos.

    Returns:
        The files, in the order in which the page lists them.

    Raises:
        OSError: If a file cannot be written.
    """
    moments = (row for moment in data.moments for row in _level_rows(data, moment))
    tables: dict[str, Iterable[Sequence[Any]]] = {
        "summary.csv": _level_rows(data, None),
        "moments.csv": moments,
        "curves.csv": _curve_rows(data),
        "videos.csv": _video_rows(data),
        "costs.csv": ((label, name, value) for label, name, value in _costs(data)),
        "flags.csv": flags,
        "skipped.csv": ((name, why, " ".join(labels)) for (name, why), labels in data.skipped.items()),
    }
    return [_write_csv(folder / name, HEADS[name], rows) for name, rows in tables.items()]


_LEVEL_HEAD = ("metric", "policy", "moment_s", *LEVELS, "not_measured_because")
_PAIRED_HEAD = tuple(f"baseline_{name}" for name in (*PAIRED, DETECTABLE))
HEADS = {
    "summary.csv": (*_LEVEL_HEAD, *_PAIRED_HEAD),
    "moments.csv": (*_LEVEL_HEAD, *_PAIRED_HEAD),
    "curves.csv": ("metric", "policy", "start_s", "end_s", "mean", "low", "high", "num_videos"),
    "videos.csv": ("metric", "policy", "video", "prompt_index", "seed_index", "value", "not_measured_because"),
    "costs.csv": ("policy", "cost", "value"),
    "flags.csv": ("policy", "video", "prompt", "kind", "start_s", "end_s", "message"),
    "skipped.csv": ("metric", "why", "policies"),
}
"""{file: names of its columns}."""


def _write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([_plain(cell) for cell in row] for row in rows)
    write_atomically(path, text.getvalue())
    return path


def _plain(cell: Any) -> Any:
    """A cell without NaN, and one that no spreadsheet takes for a formula."""
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
            level, difference = measure.level(label, moment), measure.difference(label, moment)
            paired = difference if label != data.baseline else Estimate(value=None)
            yield [
                measure.name,
                label,
                moment,
                level.value,
                *(level.extra.get(name) for name in LEVELS[1:]),
                level.reason,
                paired.value,
                *(paired.extra.get(name) for name in (*PAIRED[1:], DETECTABLE)),
            ]


def _curve_rows(data: ReportData) -> Iterable[Sequence[Any]]:
    def row(measure: Measure, label: str, point: Any) -> Sequence[Any]:
        return [measure.name, label, *(point.get(name) for name in HEADS["curves.csv"][2:])]

    for measure in data.measures.values():
        for label in data.labels:
            yield from (row(measure, label, point) for point in measure.curve(label))


def _video_rows(data: ReportData) -> Iterable[Sequence[Any]]:
    for run in data.runs:
        for video in run.videos:
            line = video.video
            for name, score in sorted(video.scores.items()):
                keys = (name, run.label, line.id, line.prompt_index, line.seed_index)
                yield [*keys, score.value, score.skipped]


def _costs(data: ReportData) -> Iterable[tuple[str, str, float]]:
    for run in data.runs:
        yield from ((run.label, name, run.costs[name]) for name in data.costs if name in run.costs)
