"""Reports: a page for a browser, figures and tables as files, and a short table for the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longtake.evaluation.flags import flags as video_flags
from longtake.evaluation.published import Row
from longtake.evaluation.records import RunScores, write_atomically, write_json
from longtake.evaluation.report_data import ReportData, digits_for, interval, number
from longtake.evaluation.report_files import FlagRow, write_files
from longtake.evaluation.report_page import render_page
from longtake.evaluation.report_plots import verdict_of
from longtake.evaluation.report_png import write_figures

if TYPE_CHECKING:
    from rich.table import Table

PAGE = "report.html"
COMPARISON = "comparison.json"
FOLDER = "report"
"""Of the figures and tables beside the page."""


def write_report(
    out: Path,
    runs: Sequence[RunScores],
    comparison: Mapping[str, Any],
    *,
    commands: Sequence[str] = (),
    protocol: Mapping[str, Any] | None = None,
    videos: Mapping[str, Path] | None = None,
    published: Sequence[Row] | None = None,
    headline: Sequence[str] | None = None,
) -> Path:
    """Write ``out/report.html``, which needs no other file, ``out/comparison.json`` and ``out/report/``: PNG and CSV.

    Args:
        out: Folder of the evaluation; made if it is not there.
        runs: One per policy; flags, costs, points of the scatter and what was skipped come from them.
        comparison: Of :func:`longtake.evaluation.comparison.compare_runs`.
        commands: What to type to get the same numbers.
        protocol: The resolved protocol; its ``name`` and ``fingerprint`` stand in the page's head.
        videos: {label: folder of its videos} for filmstrips; without it there are none.
        published: Rows of published numbers, shown greyed as context; best those of videos about as long.
        headline: Names of the measures in the first table; None takes the usual ones.

    Returns:
        The page.

    Raises:
        ValueError: If a headline measure has no value.
        OSError: If a file cannot be written.
    """
    data = ReportData(
        runs=runs,
        comparison=comparison,
        commands=commands,
        protocol=protocol or {},
        videos=videos or {},
        published=published or (),
        headline=headline,
    )
    flags = flag_rows(runs)
    written = write_files(data, out / FOLDER, flags=flags)
    figures, note = write_figures(data, out / FOLDER)
    write_json(out / COMPARISON, comparison)
    names = [*(f"{FOLDER}/{path.name}" for path in (*figures, *written)), COMPARISON]
    page = render_page(data, flags=flags, file_names=names, notes=[note] if note else [])
    write_atomically(out / PAGE, page)
    return out / PAGE


def flag_rows(runs: Sequence[RunScores]) -> list[FlagRow]:
    """What is wrong with which video, in the order of the runs and their manifests."""
    rows: list[FlagRow] = []
    for run in runs:
        for video in run.videos:
            line = video.video
            for flag in video_flags(video.scores):
                rows.append((run.label, line.id, line.prompt, flag.kind, flag.start_s, flag.end_s, flag.message))
    return rows


def summary_table(comparison: Mapping[str, Any], *, headline: Sequence[str] | None = None) -> "Table":
    """The first table of the report for the terminal.

    Args:
        comparison: Of :func:`longtake.evaluation.comparison.compare_runs`.
        headline: Names of the measures; None takes the usual ones.

    Returns:
        A rich table, a row per policy: mean, interval, and a sign where the difference to the baseline is significant.

    Raises:
        ValueError: If a headline measure has no value.
    """
    from rich.table import Table
    from rich.text import Text

    data = ReportData(runs=(), comparison=comparison, headline=headline)
    caption = f"95 % intervals; \u25b2 \u25bc significant against {data.baseline}" if data.others else "95 % intervals"
    table = Table(caption=caption, caption_justify="left")
    table.add_column("policy", no_wrap=True)
    for measure in data.headlines:
        table.add_column(Text(f"{measure.title}\n{measure.family}/"), justify="right")
    digits = [digits_for(measure.level(label) for label in data.labels) for measure in data.headlines]
    signs = {"up": " \u25b2", "down": " \u25bc", "sig": " \u25c6", "": ""}
    for label in data.labels:
        cells = [Text(label, style="bold" if label == data.baseline else "")]
        for measure, places in zip(data.headlines, digits, strict=True):
            level = measure.level(label)
            if level.value is None:
                cells.append(Text("not measured", style="dim"))
                continue
            verdict = verdict_of(measure.difference(label), measure.direction) if label != data.baseline else ""
            style = {"up": "green", "down": "red"}.get(verdict, "")
            cell = Text(number(level.value, places) + signs[verdict], style=style)
            cells.append(cell.append(f"\n{interval(level, places)}", style="dim"))
        table.add_row(*cells)
    return table
