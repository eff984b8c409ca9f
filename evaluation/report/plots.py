"""A scatter of motion against consistency, and rows of intervals around a line."""

from collections.abc import Mapping

from longtake.evaluation.report.axes import Axis, place_names, value_axis
from longtake.evaluation.report.data import Estimate, Measure, ReportData, digits_for, finite, interval, number
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
    swatch,
)

SCATTER_WIDTH = 1000.0
LETTER_WIDTH = 7.0
"""Of the page that names are placed for, in CSS pixels; others get them a little closer or further apart."""
MAX_DOTS = 1500
"""Videos in a scatter; of more, every second, third, ... is drawn."""


def scatter_figure(data: ReportData, x_measure: Measure, y_measure: Measure) -> Markup:
    """Motion against consistency: a large marker per policy, a small dot per video."""
    means = {label: (x_measure.level(label), y_measure.level(label)) for label in data.labels}
    known = {label: pair for label, pair in means.items() if None not in (pair[0].value, pair[1].value)}
    dots = _scatter_dots(data, x_measure, y_measure)
    xs = [value for _, value, _ in dots] + [pair[0].value or 0.0 for pair in known.values()]
    ys = [value for _, _, value in dots] + [pair[1].value or 0.0 for pair in known.values()]
    x = value_axis(xs, bounds=_bounds(x_measure), include=(0.0,), num_ticks=6)
    y = value_axis(ys, bounds=_bounds(y_measure))
    points = [
        tag(
            "circle",
            class_=f"dot {data.style(label)}",
            data_run=data.index(label),
            cx=f"{x.percent(across)}%",
            cy=f"{100 - y.percent(up):.2f}%",
            r=2.2,
        )
        for label, across, up in dots
    ]
    crosses = [_scatter_mean(data, label, pair, x, y) for label, pair in reversed(known.items())]
    names = _scatter_names(data, known, x, y)
    lines = tag("svg", grid(y), class_="stretch", viewBox=f"0 0 {UNITS} {UNITS}", preserveAspectRatio="none")
    corner = tag("span", "nearly still, so consistent for free", class_="corner")
    area = tag("div", lines, tag("svg", points, crosses, class_="marks"), corner, names, class_="area")
    text = "; ".join(f"{label}: {pair[0].value:.3g} and {pair[1].value:.3g}" for label, pair in known.items())
    frame = tag(
        "div",
        left_ticks(y),
        area,
        bottom_ticks(x, x.tick_texts),
        class_="frame wide",
        role="img",
        aria_label=f"{x_measure.title} against {y_measure.title}, means: {text}.",
    )
    unit = f", {x_measure.unit}" if x_measure.unit else ""
    return tag(
        "figure",
        tag("figcaption", measure_title(y_measure), " over ", measure_title(x_measure)),
        frame,
        tag("p", f"{x_measure.title}{unit} \u2192", class_="xname"),
        class_="plot scatter",
    )


def _bounds(measure: Measure) -> tuple[float | None, float | None]:
    low, high = measure.spec.get("range") or (None, None)
    return low, high


def _scatter_dots(data: ReportData, x_measure: Measure, y_measure: Measure) -> list[tuple[str, float, float]]:
    """(label, x, y) of the videos, on the scale that the means are told in."""
    dots = []
    x_scale, y_scale = (finite(measure.spec.get("scale")) or 1.0 for measure in (x_measure, y_measure))
    for run in data.runs:
        if run.label in data.labels:
            across, up = run.values(x_measure.name), run.values(y_measure.name)
            both = sorted(across.keys() & up.keys())
            dots += [(run.label, x_scale * across[key], y_scale * up[key]) for key in both]
    return dots[:: max(1, -(-len(dots) // MAX_DOTS))]


def _scatter_mean(data: ReportData, label: str, pair: tuple[Estimate, Estimate], x: Axis, y: Axis) -> Markup:
    across, up = (f"{x.percent(pair[0].value or 0.0)}%", f"{100 - y.percent(pair[1].value or 0.0):.2f}%")
    lines = []
    if pair[0].low is not None and pair[0].high is not None:
        ends = {"x1": f"{x.percent(pair[0].low)}%", "x2": f"{x.percent(pair[0].high)}%"}
        lines.append(tag("line", class_="whisker", y1=up, y2=up, **ends))
    if pair[1].low is not None and pair[1].high is not None:
        ends = {"y1": f"{100 - y.percent(pair[1].low):.2f}%", "y2": f"{100 - y.percent(pair[1].high):.2f}%"}
        lines.append(tag("line", class_="whisker", x1=across, x2=across, **ends))
    style = data.style(label)
    return tag("g", lines, marker(style, x=across, y=up), class_=style, data_run=data.index(label))


def _scatter_names(data: ReportData, known: Mapping[str, tuple[Estimate, Estimate]], x: Axis, y: Axis) -> list[Markup]:
    """Names beside the markers, placed for a page of the usual width."""
    points = [
        (
            SCATTER_WIDTH * x.percent(pair[0].value or 0.0) / 100,
            PLOT_HEIGHT * (1 - y.percent(pair[1].value or 0.0) / 100),
        )
        for pair in known.values()
    ]
    widths = [LETTER_WIDTH * len(label) for label in known]
    spots = place_names(points, widths, height=LABEL_GAP, room=(0.0, 0.0, SCATTER_WIDTH, PLOT_HEIGHT))
    names = []
    for label, point, (left, top, is_end) in zip(known, points, spots, strict=True):
        across = 100 * point[0] / SCATTER_WIDTH
        style = f"left:calc({across:.2f}% + {left - point[0]:.0f}px);top:{top:.0f}px"
        side = "name left" if is_end else "name"
        names.append(tag("span", label, class_=side, style=style, data_run=data.index(label)))
    return names


def interval_cell(estimate: Estimate, axis: Axis, *, style: str, reference: float, detectable: float | None) -> Markup:
    """One row of a plot of intervals: whisker and marker around a reference line, in a table's cell.

    Args:
        estimate: With a value.
        axis: Of the whole column.
        style: The policy's classes.
        reference: Where the line stands: no difference, no seam.
        detectable: Half width of the stretch in which a difference would be too small to be found.
    """
    zero = f"{axis.percent(reference)}%"
    parts = []
    if detectable is not None:
        left, right = axis.percent(reference - detectable), axis.percent(reference + detectable)
        parts.append(tag("rect", class_="blind", x=f"{left}%", width=f"{right - left:.2f}%", y=0, height=24))
    parts.append(tag("line", class_="zero", x1=zero, x2=zero, y1=0, y2=24))
    if estimate.low is not None and estimate.high is not None:
        ends = {"x1": f"{axis.percent(estimate.low)}%", "x2": f"{axis.percent(estimate.high)}%"}
        parts.append(tag("line", class_="whisker", y1=12, y2=12, **ends))
    parts.append(marker(style, x=f"{axis.percent(estimate.value or 0.0)}%", y=12))
    return tag("svg", parts, class_=f"interval {style}", height=24, aria_hidden="true")


def interval_rows(
    data: ReportData, rows: Mapping[str, Estimate], *, reference: float, signed: bool, direction: int = 0
) -> Markup:
    """A table of policies with their intervals drawn on one axis.

    Args:
        data: Of the report.
        rows: {label: estimate}; those without a value are told with the reason.
        reference: Where the line stands.
        signed: Whether these are differences.
        direction: 1 where higher is better, -1 where lower is.
    """
    known = [estimate for estimate in rows.values() if estimate.value is not None]
    if not known:
        return tag("p", "Not measured.", class_="quiet")
    digits = digits_for(known)
    drawn = [value for item in known for value in (item.value, item.low, item.high) if value is not None]
    axis = value_axis(drawn, include=(reference,))
    body = []
    for label, estimate in rows.items():
        style = data.style(label)
        head = tag("th", swatch(style), tag("span", label, class_="label", title=label), scope="row")
        if estimate.value is None:
            cell = tag("td", tag("span", "not measured", title=estimate.reason), colspan=2, class_="none")
            body.append(tag("tr", head, cell, data_run=data.index(label)))
            continue
        detectable = finite(estimate.extra.get("minimum_detectable")) if signed else None
        drawing = interval_cell(estimate, axis, style=style, reference=reference, detectable=detectable)
        verdict = verdict_of(estimate, direction) if signed else ""
        text = tag("span", number(estimate.value, digits, signed=signed), class_="value")
        inside = interval(estimate, digits, signed=signed)
        cells = (tag("td", drawing, class_="drawn"), tag("td", text, verdict_mark(verdict), title=inside or None))
        body.append(tag("tr", head, cells, class_=verdict or None, data_run=data.index(label)))
    return tag("table", tag("tbody", body), class_="intervals")


def verdict_of(difference: Estimate, direction: int) -> str:
    """``up``, ``down`` or ``sig`` for a significantly better, worse or other difference; else an empty text."""
    if difference.value is None or not difference.is_significant:
        return ""
    gain = direction * difference.value
    return "up" if gain > 0 else "down" if gain < 0 else "sig"


def verdict_mark(verdict: str) -> Markup | None:
    """A sign for a significant difference, told in words as well."""
    words = {"up": ("\u25b2", "better"), "down": ("\u25bc", "worse"), "sig": ("\u25c6", "different")}
    if verdict not in words:
        return None
    sign, word = words[verdict]
    return tag("abbr", sign, class_="verdict", title=f"significantly {word} than the baseline (Holm, 5 %)")
