"""Reports: a page for a browser, figures and tables as files, and a short table for the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longtake.evaluation.flags import flags as video_flags
from longtake.evaluation.published import Row
from longtake.evaluation.records import RunScores, write_atomically, write_json
from longtake.evaluation.report.data import Measure, ReportData, digits_for, interval, number
from longtake.evaluation.report.files import FlagRow, write_files
from longtake.evaluation.report.page import render_page
from longtake.evaluation.report.plots import verdict_of
from longtake.evaluation.report.png import write_figures

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

PAGE = "report.html"
COMPARISON = "comparison.json"
FOLDER = "report"
"""Of the figures and tables beside the page."""
MOST_COLUMNS = 3
MOST_MEASURES = 5
"""Policies, or measures, that stand side by side in a terminal of 80 columns."""


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
        A rich table with a sign where the difference to the baseline is significant. Few policies stand in columns,
        with their intervals; many in rows, without, and with the first measures only.

    Raises:
        ValueError: If a headline measure has no value.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    data = ReportData(runs=(), comparison=comparison, headline=headline)
    are_columns = len(data.labels) <= MOST_COLUMNS
    measures = data.headlines if are_columns or headline is not None else data.headlines[:MOST_MEASURES]
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


def _terminal_row(data: ReportData, measure: Measure, *, with_interval: bool) -> list["Text"]:
    """A measure's cells, policy by policy."""
    from rich.text import Text

    digits = digits_for(measure.level(label) for label in data.labels)
    signs = {"up": ("\u25b2", "green"), "down": ("\u25bc", "red"), "sig": ("\u25c6", ""), "": (" ", "")}
    cells = []
    for label in data.labels:
        level = measure.level(label)
        verdict = verdict_of(measure.difference(label), measure.direction) if label != data.baseline else ""
        sign, style = signs[verdict]
        cell = Text("-", style="dim") if level.value is None else Text(number(level.value, digits) + sign, style=style)
        if with_interval and level.low is not None:
            cell.append(f"\n{interval(level, digits)} ", style="dim")
        cells.append(cell)
    return cells
