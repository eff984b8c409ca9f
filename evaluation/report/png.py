"""The report's plots as PNG files for slides and papers; needs matplotlib, which is optional."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any

from longtake.evaluation.report.colours import LIGHT
from longtake.evaluation.report.curves import curve_points
from longtake.evaluation.report.data import CONSISTENCY, MOTION, SEAMS, Estimate, Measure, ReportData, finite

LINES = ("-", "--", ":")
MARKERS = ("o", "D", "s")
PANEL = (4.0, 2.8)
"""Inches."""
MISSING = "No PNG figures: they need matplotlib (pip install matplotlib); the plots of this page need nothing."


def write_figures(data: ReportData, folder: Path) -> tuple[list[Path], str]:
    """Write drift curves, differences, motion against consistency and seams.

    Args:
        data: Of the report.
        folder: Made if it is not there.

    Returns:
        The files, and why there are none if matplotlib is not installed, else an empty text.
    """
    if find_spec("matplotlib") is None:
        return [], MISSING
    folder.mkdir(parents=True, exist_ok=True)
    drawings = (
        (folder / "curves.png", draw_curves),
        (folder / "differences.png", draw_differences),
        (folder / "motion.png", draw_scatter),
        (folder / "seams.png", draw_seams),
    )
    return [path for path, draw in drawings if draw(data, path)], ""


def draw_curves(data: ReportData, path: Path) -> bool:
    """Mean and 95 % band over time, a panel per headline measure; False where no measure has a curve."""
    measures = [measure for measure in data.headlines if measure.has_curve]
    return _panels(data, measures, path, _draw_curve, legend=True)


def draw_differences(data: ReportData, path: Path) -> bool:
    """Paired differences to the baseline, a panel per headline measure; False without a baseline to compare with."""
    note = f"difference to {data.baseline}, 95 % intervals; filled: significant after Holm's correction"
    return bool(data.others and data.baseline) and _panels(data, data.headlines, path, _draw_difference, note=note)


def draw_seams(data: ReportData, path: Path) -> bool:
    """Seam ratio per policy; False where it was not measured."""
    measure = data.first(SEAMS)
    return measure is not None and _panels(data, [measure], path, _draw_levels)


def draw_scatter(data: ReportData, path: Path) -> bool:
    """Means of motion against consistency; False where either was not measured."""
    motion, consistency = data.first(MOTION), data.first(CONSISTENCY)
    if motion is None or consistency is None:
        return False

    def draw(axes: Any, data: ReportData, measure: Measure) -> None:
        for label in data.labels:
            x, y = motion.level(label), measure.level(label)
            if x.value is not None and y.value is not None:
                errors = {"xerr": _errors([x]), "yerr": _errors([y])}
                axes.errorbar([x.value], [y.value], **errors, **_style(data, label), linestyle="none", label=label)
        axes.set_xlabel(f"{motion.title} {motion.unit}".strip(), fontsize=8)

    return _panels(data, [consistency], path, draw, legend=True, scale=1.6)


Draw = Callable[[Any, ReportData, Measure], None]
"""(axes, report, measure): draws one panel."""


def _panels(
    data: ReportData,
    measures: Sequence[Measure],
    path: Path,
    draw: Draw,
    *,
    legend: bool = False,
    scale: float = 1.0,
    note: str = "",
) -> bool:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not measures:
        return False
    columns = min(3, len(measures))
    rows = ceil(len(measures) / columns)
    # Rows of policies need room by their number; a legend stands beside all panels.
    height = PANEL[1] * scale if legend else max(0.2 * len(data.labels) + 0.8, 1.4)
    least = 0.19 * len(data.labels) + 0.3 if legend else 0.0
    size = (PANEL[0] * columns * scale + (1.8 if legend else 0.0), max(height * rows, least))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, measure in zip(panels, measures, strict=False):
        draw(axes, data, measure)
        unit = f", {measure.unit}" if measure.unit else ""
        axes.set_title(f"{measure.title}{unit}", fontsize=9, loc="left")
        axes.tick_params(labelsize=7, length=2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.5)
    for axes in panels[len(measures) :]:
        axes.axis("off")
    if legend:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    if note:
        figure.supxlabel(note, fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return True


def _style(data: ReportData, label: str) -> dict[str, Any]:
    hue, line = (int(word[1:]) for word in data.style(label).split())
    return {"color": LIGHT[hue], "marker": MARKERS[line], "markersize": 4, "linewidth": 1.4}


def _draw_curve(axes: Any, data: ReportData, measure: Measure) -> None:
    for label, points in curve_points(measure, data.labels).items():
        style = _style(data, label)
        line = LINES[int(data.style(label)[-1])]
        columns = {key: [_or_nan(point.get(key)) for _, point in points] for key in ("mean", "low", "high")}
        times = [time for time, _ in points]
        axes.plot(times, columns["mean"], **{**style, "marker": None}, linestyle=line, label=label)
        if len(data.labels) <= 6:
            axes.fill_between(times, columns["low"], columns["high"], color=style["color"], alpha=0.12, linewidth=0)
    axes.set_xlabel("seconds of video", fontsize=8)


def _draw_difference(axes: Any, data: ReportData, measure: Measure) -> None:
    _draw_rows(axes, data, {label: measure.difference(label) for label in data.others}, reference=0.0)


def _draw_levels(axes: Any, data: ReportData, measure: Measure) -> None:
    _draw_rows(axes, data, {label: measure.level(label) for label in data.labels}, reference=1.0)


def _draw_rows(axes: Any, data: ReportData, rows: dict[str, Estimate], *, reference: float) -> None:
    axes.axvline(reference, color="#888888", linewidth=0.8)
    for position, (label, estimate) in enumerate(rows.items()):
        if estimate.value is not None:
            style = _style(data, label)
            face = style["color"] if estimate.is_significant or reference else "white"
            axes.errorbar([estimate.value], [position], xerr=_errors([estimate]), **style, markerfacecolor=face)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)


def _errors(estimates: Sequence[Estimate]) -> list[list[float]] | None:
    if any(item.value is None or item.low is None or item.high is None for item in estimates):
        return None
    return [
        [max(0.0, (item.value or 0.0) - (item.low or 0.0)) for item in estimates],
        [max(0.0, (item.high or 0.0) - (item.value or 0.0)) for item in estimates],
    ]


def _or_nan(value: Any) -> float:
    known = finite(value)
    return float("nan") if known is None else known
