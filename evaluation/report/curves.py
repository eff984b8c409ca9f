"""Curves over time: mean and 95 % band of every policy, with its name at the line's end."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from longtake.evaluation.report.axes import Axis, clock, seconds_axis, spread, value_axis
from longtake.evaluation.report.data import Estimate, Measure, ReportData, digits_for, finite, number
from longtake.evaluation.report.markup import Markup, tag
from longtake.evaluation.report.pieces import (
    LABEL_GAP,
    PLOT_HEIGHT,
    UNITS,
    bottom_ticks,
    grid,
    left_ticks,
    marker,
    measure_title,
    scale,
)

Points = list[tuple[float, Mapping[str, Any]]]
"""(middle of the window in seconds, window)."""


def curve_points(measure: Measure, labels: Iterable[str]) -> dict[str, Points]:
    """{label: (middle of the window in seconds, window)} of those that have a curve.

    A window that repeats most of the one before it is left out, as VBench-Long's last clip does.
    """
    found = {}
    for label in labels:
        points: Points = []
        end = 0.0
        for point in measure.curve(label):
            if end - point["start_s"] <= (point["end_s"] - point["start_s"]) / 2:
                points.append(((point["start_s"] + point["end_s"]) / 2, point))
                end = point["end_s"]
        if any(finite(point.get("mean")) is not None for _, point in points):
            found[label] = points
    return found


def curve_figure(data: ReportData, measure: Measure, *, identity: str, hidden: bool = False) -> Markup:
    """Mean and 95 % band of every policy over time.

    Args:
        data: Of the report.
        measure: One with a curve.
        identity: The figure's id.
        hidden: Whether another figure is shown at first.
    """
    curves = curve_points(measure, data.labels)
    end = max(point["end_s"] for points in curves.values() for _, point in points)
    x, y = seconds_axis(end), _curve_axis(measure, curves)
    times = sorted({time for points in curves.values() for time, _ in points})
    digits = _digits(curves)
    groups = [
        tag(
            "g",
            tag("path", class_="band", d=_band(points, x, y)),
            tag("path", class_="line", d=_line(points, x, y)),
            class_=data.style(label),
            data_run=data.index(label),
            data_m=_readout(points, times, digits),
        )
        for label, points in reversed(curves.items())
    ]
    lines = tag("svg", grid(y), groups, class_="stretch", viewBox=f"0 0 {UNITS} {UNITS}", preserveAspectRatio="none")
    marks, ends = _line_ends(data, curves, x, y)
    moments = " ".join(f"{time:g}" for time in times)
    area = tag("div", lines, tag("svg", marks, class_="marks"), class_="area", data_t=moments, data_end=f"{end:g}")
    frame = tag(
        "div",
        left_ticks(y),
        area,
        ends,
        bottom_ticks(x, [clock(tick, end=end) for tick in x.ticks]),
        class_="frame",
        role="img",
        aria_label=_curve_text(data, measure, curves),
    )
    note = "seconds of video" if end <= 180 else "minutes and seconds of video"
    return tag(
        "figure",
        tag("figcaption", measure_title(measure)),
        frame,
        tag("p", note, class_="xname"),
        class_="plot curves",
        id=identity,
        hidden=hidden,
    )


def _curve_axis(measure: Measure, curves: Mapping[str, Points]) -> Axis:
    keys = ("mean", "low", "high")
    values = [finite(point.get(key)) for points in curves.values() for _, point in points for key in keys]
    bounds = tuple(measure.spec.get("range") or (None, None))
    return value_axis([value for value in values if value is not None], bounds=(bounds[0], bounds[1]))


def _line(points: Points, x: Axis, y: Axis) -> str:
    """A path through the means; a window without a value leaves a gap, one between two gaps a dot."""
    across, up = scale(x), scale(y)
    words: list[str] = []
    before: tuple[int, int] | None = None
    for time, point in points:
        mean = finite(point.get("mean"))
        if mean is None:
            before = None
            continue
        here = (across(time), UNITS - up(mean))
        words.append(f"M{here[0]} {here[1]}h0" if before is None else f"l{here[0] - before[0]} {here[1] - before[1]}")
        before = here
    return "".join(words)


def _band(points: Points, x: Axis, y: Axis) -> str:
    """A closed path around the intervals of each run of windows that have one."""
    across, up = scale(x), scale(y)
    parts: list[str] = []
    stretch: list[tuple[int, int, int]] = []
    for time, point in [*points, (0.0, {})]:
        low, high = finite(point.get("low")), finite(point.get("high"))
        if low is not None and high is not None:
            stretch.append((across(time), UNITS - up(high), UNITS - up(low)))
            continue
        if len(stretch) > 1:
            outline = [(t, top) for t, top, _ in stretch] + [(t, bottom) for t, _, bottom in reversed(stretch)]
            steps = zip(outline, outline[1:], strict=False)
            moves = "".join(f"l{to[0] - at[0]} {to[1] - at[1]}" for at, to in steps)
            parts.append(f"M{outline[0][0]} {outline[0][1]}{moves}z")
        stretch = []
    return "".join(parts)


def _digits(curves: Mapping[str, Points]) -> int:
    sample = (point for points in curves.values() for _, point in points[:: 1 + len(points) // 8])
    return digits_for(Estimate.read(point) for point in sample)


def _readout(points: Points, times: Sequence[float], digits: int) -> str:
    """The means at the figure's times, for the readout under the pointer."""
    known = {time: finite(point.get("mean")) for time, point in points}
    return " ".join("-" if known.get(time) is None else f"{known[time]:.{digits}f}" for time in times)


def _line_ends(data: ReportData, curves: Mapping[str, Points], x: Axis, y: Axis) -> tuple[list[Markup], Markup]:
    """A marker at each line's last value, and its name beside it with a leader."""
    last = {}
    for label, points in curves.items():
        known = [(time, value) for time, point in points if (value := finite(point.get("mean"))) is not None]
        last[label] = known[-1]
    marks = [
        marker(
            data.style(label), x=f"{x.percent(time)}%", y=f"{100 - y.percent(value):.2f}%", data_run=data.index(label)
        )
        for label, (time, value) in last.items()
    ]
    wished = [PLOT_HEIGHT * (1 - y.percent(value) / 100) for _, value in last.values()]
    placed = spread(wished, gap=LABEL_GAP, low=4.0, high=PLOT_HEIGHT - 4.0)
    leaders, names = [], []
    for label, wish, place in zip(last, wished, placed, strict=True):
        run = {"data_run": data.index(label)}
        path = f"M0 {wish:.0f}L16 {place:.0f}"
        leaders.append(tag("path", class_=f"leader {data.style(label)}", d=path, **run))
        names.append(tag("span", label, class_="end", style=f"top:{place:.0f}px", title=label, **run))
    drawing = tag("svg", leaders, width=16, height=PLOT_HEIGHT, class_="leaders")
    return marks, tag("div", drawing, names, class_="ends")


def _curve_text(data: ReportData, measure: Measure, curves: Mapping[str, Points]) -> str:
    """What the figure shows, in words."""
    parts = []
    digits = _digits(curves)
    for label, points in curves.items():
        known = [value for _, point in points if (value := finite(point.get("mean"))) is not None]
        parts.append(f"{label} from {number(known[0], digits)} to {number(known[-1], digits)}")
    return f"{measure.title} over time, first window to last: {'; '.join(parts)}."
