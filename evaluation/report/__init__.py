"""Reports: a page for a browser, figures and tables as files, and a short table for the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longtake.evaluation.published import Row
from longtake.evaluation.records import RunScores, write_atomically, write_json
from longtake.evaluation.report.data import ReportData
from longtake.evaluation.report.figures import write_figures
from longtake.evaluation.report.page import render_page
from longtake.evaluation.report.tables import write_csv_files

_PAGE = "report.html"
_COMPARISON = "comparison.json"
_FOLDER = "report"


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
        out: Folder of the evaluation; created if missing.
        runs: One per policy; flags, costs, points of the scatter and reasons for missing numbers come from them.
        comparison: Result of :func:`longtake.evaluation.comparison.compare_runs`.
        commands: Command lines that reproduce the numbers.
        protocol: The resolved protocol; its ``name`` and ``fingerprint`` stand in the page's head.
        videos: {label: folder of its videos} for filmstrips; without it there are none.
        published: Rows of published numbers, shown in grey as context; best those of videos about as long.
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
    written = write_csv_files(data, out / _FOLDER)
    figures = write_figures(data, out / _FOLDER)
    write_json(out / _COMPARISON, comparison)
    names = [*(f"{_FOLDER}/{path.name}" for path in (*figures, *written)), _COMPARISON]
    write_atomically(out / _PAGE, render_page(data, file_names=names))
    return out / _PAGE
