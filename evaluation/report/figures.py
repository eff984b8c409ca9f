"""Pictures of a report: plots as inline SVG and as PNG files, both drawn with matplotlib, and filmstrips."""

import re
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO, StringIO
from math import ceil, nan
from pathlib import Path, PurePosixPath
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps

from longtake.evaluation.records import NUM_SHOWN_PROMPTS, ManifestLine
from longtake.evaluation.report.data import (
    CONSISTENCY,
    LIGHT,
    LIGHT_PAGE,
    MOTION,
    SEAMS,
    VERDICTS,
    Estimate,
    Measure,
    ReportData,
    digits_for,
    finite,
    number,
    plain_text,
)
from longtake.evaluation.video import VideoSource

_INK, _SOFT, _RULE, _BLIND, _UP, _DOWN = LIGHT[0], "#59626f", "#dfe3e8", "#e9ecf0", "#0b6b8a", "#b03a0a"
_VARIABLES = {colour: f"h{index}" for index, colour in enumerate(LIGHT)}
_VARIABLES |= {LIGHT_PAGE: "page", _SOFT: "soft", _RULE: "line", _BLIND: "blind", _UP: "up", _DOWN: "down"}
"""{colour of a drawing: variable of the page's style sheet}, which has other values on a dark screen."""
_LINES = ("-", "--", ":")
_MARKERS = ("o", "D", "s")
CURVE_LEFT, CURVE_RIGHT = 0.06, 0.79  # sides of the axes as shares of the width; the page's readout lies over them
_MAX_DOTS = 1500  # videos in a scatter; of more, every second, third, ... is drawn.
_MAX_BANDS = 6  # policies with bands in a PNG; the page has a switch

Points = list[tuple[float, Mapping[str, Any]]]  # (middle of the window in seconds, window)
Draw = Callable[[Axes, ReportData, Measure], list[str]]
"""Draws a panel; returns the policies of its legend from top to bottom."""


def curve_points(measure: Measure, labels: Iterable[str]) -> dict[str, Points]:
    """{label: points} of the policies that have a curve.

    A window that repeats most of the previous one is left out: VBench-Long's last clip does.
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


def draw_curve(axes: Axes, data: ReportData, measure: Measure) -> list[str]:
    """Mean and 95 % band of every policy over time; a window without a value leaves a gap."""
    curves = curve_points(measure, data.labels)
    end = max(point["end_s"] for points in curves.values() for _, point in points)
    unit = 60.0 if end > 180 else 1.0
    last = {}
    for label, points in reversed(curves.items()):
        means, lows, highs = ([_or_nan(point.get(key)) for _, point in points] for key in ("mean", "low", "high"))
        times = [time / unit for time, _ in points]
        style, name = _style(data, label), partial(_gid, data, label)
        axes.fill_between(times, lows, highs, color=style["color"], alpha=0.12, linewidth=0, gid=name("band"))
        axes.plot(times, means, **_style(data, label, marker=""), gid=name("line"))
        at = max(index for index, mean in enumerate(means) if mean == mean)
        axes.plot(times[at], means[at], **_style(data, label, linestyle=""), gid=name("mark"))
        last[label] = means[at]
    axes.set_xlim(0.0, end / unit)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 3, 6, 10]))
    axes.set_xlabel("minutes of video" if end > 180 else "seconds of video")
    _bound(axes, measure)
    return sorted(last, key=lambda label: -last[label])


def draw_scatter(axes: Axes, data: ReportData, measure: Measure, *, motion: Measure) -> list[str]:
    """Motion against another measure: a large marker with intervals per policy, a small dot per video."""
    dots = _dots(data, motion, measure)
    heights = {}
    for label in reversed(data.labels):
        x, y = motion.level(label), measure.level(label)
        if x.value is None or y.value is None:
            continue
        own = [[dot[axis] for dot in dots if dot[0] == label] for axis in (1, 2)]
        colour, name = LIGHT[data.hue_and_line(label)[0]], _gid(data, label, "dots")
        axes.plot(*own, "o", color=colour, markersize=3, markeredgewidth=0, alpha=0.3, gid=name)
        _draw_estimates(axes, data, label, x=x, y=y)
        heights[label] = y.value
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.set_xlabel(", ".join(filter(None, (motion.title, motion.unit))))
    _bound(axes, measure)
    return sorted(heights, key=lambda label: -heights[label])


def _dots(data: ReportData, x_measure: Measure, y_measure: Measure) -> list[tuple[str, float, float]]:
    """(label, x, y) of the videos, on the scale of the means."""
    dots = []
    x_scale, y_scale = (finite(measure.spec.get("scale")) or 1.0 for measure in (x_measure, y_measure))
    for run in data.runs:
        across, up = run.values(x_measure.name), run.values(y_measure.name)
        both = sorted(across.keys() & up.keys())
        dots += [(run.label, x_scale * across[key], y_scale * up[key]) for key in both]
    return dots[:: max(1, -(-len(dots) // _MAX_DOTS))]


def draw_differences(axes: Axes, data: ReportData, measure: Measure) -> list[str]:
    """Paired differences to the baseline around zero; the stretch too small to be found is shaded."""
    return _draw_rows(axes, data, measure, labels=data.others, is_difference=True)


def draw_levels(axes: Axes, data: ReportData, measure: Measure) -> list[str]:
    """Mean and interval of every policy around one."""
    return _draw_rows(axes, data, measure, labels=data.labels, is_difference=False)


_ROWS = (draw_differences, draw_levels)


def _draw_rows(
    axes: Axes, data: ReportData, measure: Measure, *, labels: Sequence[str], is_difference: bool
) -> list[str]:
    rows = {label: measure.difference(label) if is_difference else measure.level(label) for label in labels}
    digits = digits_for(rows.values())
    axes.axvline(0.0 if is_difference else 1.0, color=_SOFT, linewidth=0.8, zorder=1)
    row = {"transform": axes.get_yaxis_transform(), "va": "center"}
    for position, (label, estimate) in enumerate(rows.items()):
        verdict = measure.verdict(label) if is_difference else ""
        size = finite(estimate.extra.get("minimum_detectable")) if is_difference else None
        if size is not None:
            axes.barh(position, 2 * size, 1.0, -size, color=_BLIND, zorder=0, gid=_gid(data, label, "blind"))
        is_filled = not is_difference or estimate.is_significant
        _draw_estimates(axes, data, label, x=estimate, y=Estimate(value=position), is_filled=is_filled)
        text = f"{number(estimate.value, digits, signed=is_difference) or 'not measured'} {VERDICTS[verdict][0]}"
        colour = {"up": _UP, "down": _DOWN}.get(verdict, _INK if estimate.value is not None else _SOFT)
        axes.text(1.03, position, text, color=colour, gid=_gid(data, label, "value"), **row)
        axes.text(-0.03, position, plain_text(label), ha="right", gid=_gid(data, label, "name"), **row)
    axes.set_yticks([])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.spines["left"].set_visible(False)
    return []


def _draw_estimates(
    axes: Axes, data: ReportData, label: str, *, x: Estimate, y: Estimate, is_filled: bool = True
) -> None:
    if x.value is None or y.value is None:
        return
    colour = LIGHT[data.hue_and_line(label)[0]]
    bars = {"color": colour, "linewidth": 1.6, "gid": _gid(data, label, "whisker")}
    if x.low is not None and x.high is not None:
        axes.plot([x.low, x.high], [y.value, y.value], **bars)
    if y.low is not None and y.high is not None:
        axes.plot([x.value, x.value], [y.low, y.high], **bars)
    face = colour if is_filled else LIGHT_PAGE
    style = _style(data, label, markersize=6, markerfacecolor=face, markeredgewidth=1.2, linestyle="")
    axes.plot(x.value, y.value, **style, gid=_gid(data, label, "mark"))


def _style(data: ReportData, label: str, **changes: Any) -> dict[str, Any]:
    hue, line = data.hue_and_line(label)
    style = {"color": LIGHT[hue], "linestyle": _LINES[line], "marker": _MARKERS[line], "markersize": 5}
    hollow = {"markerfacecolor": LIGHT_PAGE if line else LIGHT[hue], "markeredgewidth": 1.2 if line else 0}
    return style | hollow | changes


def _gid(data: ReportData, label: str, kind: str) -> str:
    return f"run-{data.index(label)}-{kind}"


def _or_nan(value: Any) -> float:
    known = finite(value)
    return nan if known is None else known


def _bound(axes: Axes, measure: Measure) -> None:
    low, high = axes.get_ylim()
    if measure.least is not None and low < measure.least <= axes.dataLim.y0:
        axes.set_ylim(bottom=measure.least)
    if measure.greatest is not None and high > measure.greatest >= axes.dataLim.y1:
        axes.set_ylim(top=measure.greatest)


def _legend(place: Axes | Figure, data: ReportData, labels: Sequence[str], **options: Any) -> None:
    handles = [Line2D([], [], **_style(data, label)) for label in labels]
    # Matplotlib drops labels that begin with an underscore, so the texts are set afterwards.
    legend = place.legend(handles, [str(index) for index in range(len(labels))], frameon=False, **options)
    for label, handle, text in zip(labels, legend.legend_handles, legend.get_texts(), strict=True):
        text.set(text=plain_text(label), gid=_gid(data, label, "end"))
        if handle is not None:
            handle.set_gid(_gid(data, label, "key"))


@contextmanager
def _drawing(font_size: float) -> Iterator[None]:
    """Settings of both outputs, whatever the user's own are; labels are text and never formulas."""
    settings: dict[Any, Any] = {
        **{"font.size": font_size, "font.family": "DejaVu Sans", "text.parse_math": False, "svg.fonttype": "none"},
        **{"svg.hashsalt": "longtake", "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": _SOFT},
        **{"axes.grid": True, "grid.color": _RULE, "grid.linewidth": 0.7, "axes.axisbelow": True, "text.color": _INK},
        **{"xtick.color": _SOFT, "ytick.color": _SOFT, "axes.labelcolor": _SOFT, "lines.linewidth": 1.7},
        **{"xtick.major.size": 2, "ytick.major.size": 2, "axes.unicode_minus": True},
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield


def plot_svg(data: ReportData, measure: Measure, draw: Draw, *, identity: str) -> Markup:
    """Draw a measure for the page; ids in the SVG begin with ``identity``."""
    has_rows = draw in _ROWS
    width, height = (400, 22 * len(data.labels) + 26) if has_rows else (960, 390)
    name_width = min(0.06 + 0.0155 * max(map(len, data.labels)), 0.45)
    left, right = (name_width, 0.77) if has_rows else (CURVE_LEFT, CURVE_RIGHT)
    with _drawing(font_size=10.5):
        figure = Figure(figsize=(width / 72, height / 72))
        figure.subplots_adjust(left, (22 if has_rows else 36) / height, right, 1 - 6 / height)
        axes = figure.subplots()
        labels = draw(axes, data, measure)
        if labels:
            _legend(axes, data, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9.5, handlelength=2.2)
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return Markup(_inline(text.getvalue(), identity))


def _inline(svg: str, identity: str) -> str:
    """A matplotlib SVG as part of a page: policies as data-run, colours of the page, and ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"(?s)<metadata>.*?</metadata>|<style.*?</style>| xmlns(:xlink)?=\"[^\"]*\"", "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r'\1 aria-hidden="true"', svg, count=1)
    svg = re.sub(r'id="run-(\d+)-(\w+)"', r'data-run="\1" class="\2"', svg)
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    # Nothing reaches over its axes. Texts, widths and caps are those of the page's style sheet.
    unused = r' clip-path="[^"]*"|; stroke-linecap: square| font-family: [^;"]*;| transform="rotate\(-0[^"]*"'
    svg = re.sub(rf"{unused}|<clipPath.*?</clipPath>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'href="#([\w-]+)', svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda found: f' id="{identity}-{found[1]}"' if found[1] in used else "", svg)
    svg = svg.replace('href="#', f'href="#{identity}-')
    svg = re.sub(r' (d|x|y)="[^"]+"', lambda found: _short(found[0]), svg)
    return re.sub(r">\s+<", "><", svg)


def _short(numbers: str) -> str:
    """Coordinates to a tenth of a pixel, without the letters that paths may leave out."""
    numbers = re.sub(r"\.(\d)\d*", lambda found: "" if found[1] == "0" else f".{found[1]}", numbers)
    return re.sub(r"\s*\n?L\s*|\s+", " ", numbers).replace(' "', '"')


def write_figures(data: ReportData, folder: Path) -> list[Path]:
    """Write curves, differences, motion against consistency and seams as PNG files, as far as they were measured."""
    folder.mkdir(parents=True, exist_ok=True)
    motion, consistency, seams = data.first(MOTION), data.first(CONSISTENCY), data.first(SEAMS)
    written = [draw_curves_png(data, folder / "curves.png")]
    if data.is_compared:
        note = f"difference to {data.baseline}, 95 % intervals; filled: significant after Holm's correction"
        written.append(_png(data, data.headlines, draw_differences, folder / "differences.png", note=note))
    if motion is not None and consistency is not None:
        draw = partial(draw_scatter, motion=motion)
        written.append(_png(data, [consistency], draw, folder / "motion.png", scale=1.6))
    if seams is not None:
        written.append(_png(data, [seams], draw_levels, folder / "seams.png"))
    return [path for path in written if path is not None]


def draw_curves_png(data: ReportData, path: Path) -> Path | None:
    """Draw a panel per headline measure over time; None where no measure has a curve."""
    return _png(data, [measure for measure in data.headlines if measure.has_curve], draw_curve, path)


def _png(
    data: ReportData, measures: Sequence[Measure], draw: Draw, path: Path, *, note: str = "", scale: float = 1.0
) -> Path | None:
    if not measures:
        return None
    has_rows = draw in _ROWS
    columns = min(3, len(measures))
    num_rows = ceil(len(measures) / columns)
    # Rows of policies need room by their number; a legend stands beside all panels.
    height = max(0.2 * len(data.labels) + 0.8, 1.4) if has_rows else 2.8 * scale
    width = 4.0 * columns * scale + (0.0 if has_rows else 1.8)
    least = 0.0 if has_rows else 0.19 * len(data.labels) + 0.3
    with _drawing(font_size=7.5):
        figure = Figure(figsize=(width, max(height * num_rows, least)), layout="constrained")
        panels = figure.subplots(num_rows, columns, squeeze=False).flatten()
        for axes, measure in zip(panels, measures, strict=False):
            draw(axes, data, measure)
            axes.set_title(", ".join(filter(None, (measure.title, measure.unit))), fontsize=9, loc="left")
            for artist in axes.collections if len(data.labels) > _MAX_BANDS else ():
                artist.set_visible(False)
        for axes in panels[len(measures) :]:
            axes.axis("off")
        if not has_rows:
            _legend(figure, data, data.labels, loc="outside right upper", fontsize=8)
        if note:
            figure.supxlabel(plain_text(note), fontsize=8)
        figure.savefig(path, dpi=130, metadata={"Software": None})
    return path


_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_FRAME = (144, 128)  # width and height that a frame fits into, in pixels
_QUALITY = 62
_GAP = 3  # transparent pixels between two frames of a strip


@dataclass(frozen=True, kw_only=True)
class _Film:
    """A policy's strip of a prompt, or the reason why there is none."""

    label: str
    uri: str = ""
    alt: str = ""
    width: int = 240
    height: int = 0
    reason: str = ""


def films_by_prompt(data: ReportData) -> list[tuple[int, str, list[_Film]]]:
    """(prompt index, its text, a film per policy) of the prompts shown; empty without folders of videos."""
    found = []
    for prompt in _shared_prompts(data) if data.videos else ():
        lines = {label: line for label in data.videos if (line := _first_video(data, label, prompt)) is not None}
        films = [_film(data.videos[label], lines[label], label) for label in data.labels if label in lines]
        if films:
            found.append((prompt, lines[films[0].label].prompt, films))
    return found


def _shared_prompts(data: ReportData, *, count: int = NUM_SHOWN_PROMPTS) -> list[int]:
    """Return the first prompts that most policies have a video of."""
    counts = Counter(prompt for _, prompt in {(label, line.prompt_index) for label, line in data.lines})
    most = max(counts.values(), default=0)
    return sorted(prompt for prompt, number in counts.items() if number == most)[:count]


def _first_video(data: ReportData, label: str, prompt: int) -> ManifestLine | None:
    lines = [line for own, line in data.lines if own == label and line.prompt_index == prompt]
    return min(lines, key=lambda line: line.seed_index, default=None)


def _film(folder: Path, line: ManifestLine, label: str) -> _Film:
    path = _find_video(folder, line)
    if path is None:
        return _Film(label=label, reason=f"{PurePosixPath(line.file).name} is not there any more")
    try:
        image = _strip(VideoSource.open(path, fps=line.fps or None))
    except ValueError as error:
        return _Film(label=label, reason=f"not shown: {error}")
    buffer = BytesIO()
    image.save(buffer, format="WEBP", quality=_QUALITY, method=4)
    uri = "data:image/webp;base64," + b64encode(buffer.getvalue()).decode("ascii")
    shares = ", ".join(f"{share:.0%}" for share in _SHARES)
    alt = f"{label}, seed {line.seed_index}: frames at {shares} of the video"
    return _Film(label=label, uri=uri, alt=alt, width=image.width, height=image.height)


def _find_video(folder: Path, line: ManifestLine) -> Path | None:
    candidates = (folder / line.file, folder / PurePosixPath(line.file).name)
    return next((path for path in candidates if path.exists()), None)


def _strip_indices(num_frames: int) -> list[int]:
    return [round(share * (num_frames - 1)) for share in _SHARES]


def _strip(source: VideoSource) -> Image.Image:
    """Frames of a video side by side, decoded as a stream that stops after the last one needed."""
    wanted = _strip_indices(source.num_frames)
    found: dict[int, np.ndarray] = {}
    start = 0
    for piece in source.pieces():
        found |= {index: piece[index - start] for index in wanted if start <= index < start + len(piece)}
        start += len(piece)
        if len(found) == len(set(wanted)):
            break
    frames = [_resized(found[index]) for index in wanted]
    width = frames[0].width
    strip = Image.new("RGBA", ((width + _GAP) * len(frames) - _GAP, frames[0].height), (0, 0, 0, 0))
    for position, frame in enumerate(frames):
        strip.paste(frame, (position * (width + _GAP), 0))
    return strip


def _resized(frame: np.ndarray) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(frame))
    factor = int(min(_FRAME[0] / image.width, _FRAME[1] / image.height))
    if factor:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return ImageOps.contain(image, _FRAME, Image.Resampling.LANCZOS)
