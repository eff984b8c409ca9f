"""Pieces that all plots of a report are made of, as HTML and inline SVG that need nothing else.

Lines live in an SVG that is stretched to its box with strokes of constant width; everything else is placed in percent,
so that text and markers keep their size on a phone.
"""

from collections.abc import Callable, Sequence

from longtake.evaluation.report.axes import Axis
from longtake.evaluation.report.data import Measure
from longtake.evaluation.report.markup import Markup, join, tag

PLOT_HEIGHT = 380
"""Of curves and scatter, in CSS pixels; the style sheet has the same number."""
LABEL_GAP = 16.0
UNITS = 1000
"""Of the stretched SVG, both ways: a third of a pixel."""


def marker_definitions() -> Markup:
    """The markers that all plots share: circle, diamond, square; one per line style."""
    shapes = (
        tag("circle", id="m0", r=4.5),
        tag("path", id="m1", d="M0 -5.6L5.6 0L0 5.6L-5.6 0Z"),
        tag("rect", id="m2", x=-4, y=-4, width=8, height=8),
    )
    return tag("svg", tag("defs", shapes), class_="defs", width=0, height=0, aria_hidden="true")


def marker(style: str, **attributes: object) -> Markup:
    """A policy's marker, to be placed with x and y."""
    return tag("use", href=f"#m{style[-1]}", class_=f"mark {style}", **attributes)


def swatch(style: str) -> Markup:
    """A policy's line and marker, for legends and tables."""
    line = tag("path", class_="line", d="M0 7H26")
    return tag(
        "svg", line, marker(style, x=13, y=7), class_=f"swatch {style}", width=26, height=14, aria_hidden="true"
    )


def measure_title(measure: Measure) -> Markup:
    """A measure's title with its unit, direction and stand-ins."""
    stand_in = f"[{measure.backbone}]" if measure.backbone else ""
    notes = [measure.place + stand_in, measure.unit, measure.direction_text]
    small = " \u00b7 ".join(note for note in notes if note)
    return join(tag("strong", measure.title), " ", tag("span", small, class_="note", title=measure.name))


def scale(axis: Axis) -> Callable[[float], int]:
    """What puts values on an axis, in units of the stretched SVG; values outside stand at its ends."""
    low, factor = axis.low, UNITS / (axis.high - axis.low)
    return lambda value: round(min(max((value - low) * factor, 0.0), UNITS))


def grid(y: Axis) -> Markup:
    """Quiet lines at an axis' ticks."""
    lines = [f"M0 {UNITS - scale(y)(tick)}H{UNITS}" for tick in y.ticks]
    return tag("path", class_="grid", d="".join(lines))


def left_ticks(y: Axis) -> Markup:
    """The ticks' values beside a plot."""
    texts = zip(y.ticks, y.tick_texts, strict=True)
    spans = [tag("span", text, style=f"top:{100 - y.percent(tick):.2f}%") for tick, text in texts]
    return tag("div", spans, class_="ys")


def bottom_ticks(x: Axis, texts: Sequence[str]) -> Markup:
    """The ticks' values below a plot."""
    spans = [tag("span", text, style=f"left:{x.percent(tick)}%") for tick, text in zip(x.ticks, texts, strict=True)]
    return tag("div", spans, class_="xs")
