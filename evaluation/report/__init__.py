"""Report of an evaluation: one page for a browser with all that it shows, and figures and tables as files."""

import re
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from longtake.evaluation.comparison import LEVEL
from longtake.evaluation.metric import WINDOW_SECONDS
from longtake.evaluation.published import TAGS
from longtake.evaluation.records import COMPARISON_FILE, REPORT_FILE, write_atomically, write_json
from longtake.evaluation.report import figures
from longtake.evaluation.report.data import (
    CONSISTENCY,
    DARK,
    DARK_PAGE,
    LIGHT,
    LIGHT_PAGE,
    MAIN_COSTS,
    MOTION,
    SEAMS,
    VERDICTS,
    Estimate,
    Measure,
    ReportData,
    digits_for,
    finite,
    interval,
    number,
    plain_text,
)
from longtake.evaluation.report.tables import write_csv_files
from longtake.evaluation.scores import QUALITY

_FOLDER = "report"
_FAMILIES = {
    "vbench": "VBench's formula with VBench's own network, or none needed: may stand beside published numbers made "
    "under the same protocol",
    "vbench_form": "VBench's formula with a stand-in network: compare within this page only",
    "proxy": "our own measures, no network",
    "drift": "change of another measure from the start of a video to its end",
    "set": "a property of the whole set of videos",
    "judge": "the bundled judge of the mini model's world",
}
_COMPOSITES = {"quality7": "Quality (7 dimensions)", "quality6_long": "Quality (6, long)", "total": "Total"}
_PUBLISHED = {
    **{name: name.replace("_", " ") for name in QUALITY},
    "overall_consistency": "overall consistency",
    "quality7": "Quality, 7",
    "quality6_long": "Quality, 6",
    "semantic": "Semantic",
    "total": "Total",
}
"""Columns of published tables that a report can set its own numbers beside, in percent, and their titles."""
_FEW_PROMPTS = 10
_MANY_POLICIES = 8  # above this number the tables of moments are folded at first
_MAX_FLAGS = 200  # rows of the page's table of flags; the CSV file has all
_MAX_CURVE_POINTS = 80_000  # windows drawn over all figures; the curves of further measures are in curves.csv only


def write_report(out: Path, data: ReportData) -> Path:
    """Write ``out/report.html``, which needs no other file, ``out/comparison.json`` and ``out/report/``: PNG and CSV.

    Returns the page.
    """
    written = write_csv_files(data, out / _FOLDER)
    figure_files = figures.write_figures(data, out / _FOLDER)
    write_json(out / COMPARISON_FILE, data.comparison)
    names = [*(f"{_FOLDER}/{path.name}" for path in (*figure_files, *written)), COMPARISON_FILE]
    write_atomically(out / REPORT_FILE, render_page(data, file_names=names))
    return out / REPORT_FILE


def render_page(data: ReportData, *, file_names: Sequence[str]) -> str:
    """Make the HTML document; ``file_names`` are those of files beside it, relative to it."""
    loader = PackageLoader("longtake.evaluation.report", package_path="")
    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": StrictUndefined}
    environment = Environment(loader=loader, **options)
    environment.filters |= {"breakable": _breakable, "number": number, "interval": interval, "digits": _two_digits}
    asset = files("longtake.evaluation.report").joinpath
    style, script = (asset(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = b64encode(sha256(script.encode("utf-8")).digest()).decode("ascii")
    text = environment.get_template("page.html.j2").render(
        data=data,
        contents=_sections(data),
        style=Markup(style),
        script=Markup(script),
        script_hash=digest,
        light=(LIGHT_PAGE, *LIGHT),
        dark=(DARK_PAGE, *DARK),
        facts=_facts(data),
        fingerprint=_fingerprint(data),
        settings=list(_flatten(data.protocol)),
        file_names=file_names,
        families=_FAMILIES,
        verdicts=VERDICTS,
        tags=TAGS,
        main_costs={name: title for name, title in data.costs.items() if name in MAIN_COSTS},
        max_flags=_MAX_FLAGS,
        window_seconds=WINDOW_SECONDS,
    )
    return plain_text(text.lstrip())


def _breakable(text: object) -> Markup:
    return Markup(re.sub(r"(?<=[_/+=,])(?=[A-Za-z0-9])|(?=\[)", "<wbr>", escape(text)))


def _two_digits(value: float) -> int:
    return digits_for([Estimate(value=value)], figures=2)


def _sections(data: ReportData) -> dict[str, Any]:
    """{section: its content}; one without content is not shown."""
    seams = data.first(SEAMS)
    return {
        "summary": {"findings": list(_findings(data)), "composites": _composites(data)},
        "differences": [
            _panel(data, measure, figures.draw_differences, f"difference{position}")
            for position, measure in enumerate(data.headlines if data.is_compared else ())
        ],
        "moments": _moments(data),
        "curves": _curves(data),
        "motion": _scatter(data),
        "seams": _panel(data, seams, figures.draw_levels, "seam_rows") if seams is not None else None,
        "films": figures.films_by_prompt(data),
        "costs": data.costs,
        "flags": True,
        "all": [(family, list(group)) for family, group in groupby(data.measures.values(), key=lambda it: it.family)],
        "missing": _skipped(data),
        "published": _published(data),
        "method": True,
    }


def _facts(data: ReportData) -> dict[str, str]:
    length = ""
    if data.seconds is not None:
        low, high = data.seconds
        length = f"{high:.3g} s each" if high - low < 0.5 else f"{low:.3g} to {high:.3g} s"
    return {
        "policies": str(len(data.labels)),
        "videos": str(len(data.lines)),
        "prompts": f"{data.num_prompts}" + (f" \u00d7 {data.num_seeds} seeds" if data.num_seeds > 1 else ""),
        "length": length,
        "baseline": data.baseline if len(data.labels) > 1 else "",
        "protocol": f"{data.protocol.get('name') or ''} {_fingerprint(data)}".strip(),
    }


def _fingerprint(data: ReportData) -> str:
    sources = [data.protocol, *(run.header for run in data.runs)]
    return next((source["fingerprint"] for source in sources if "fingerprint" in source), "")


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if not prefix and value in (None, "", (), [], {}):
            continue
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            listed = isinstance(value, list | tuple)
            yield f"{prefix}{key}", ", ".join(str(item) for item in value) if listed else str(value)


def _findings(data: ReportData) -> Iterator[str]:
    if data.is_compared:
        known = [item.difference(label) for label in data.others for item in data.headlines]
        known = [difference for difference in known if difference.value is not None]
        count = sum(difference.is_significant for difference in known)
        yield f"{count} of {len(known)} differences to {data.baseline} are significant in the measures of this table."
        if len(data.others) <= 6:
            yield from (_verdict(data, label) for label in data.others)
    counts = Counter(row[0] for row in data.flags)
    if counts:
        text = ", ".join(f"{label} {count}" for label, count in counts.most_common())
        start = Markup('Videos were <a href="#flags">flagged</a> as frozen, looping, cutting or flickering: {}.')
        yield start.format(text)
    official = [item.title for item in data.headlines if item.is_comparable]
    if official:
        yield f"Only {', '.join(official)} may stand beside published VBench numbers, under the same protocol."
    else:
        yield "Nothing in this table may stand beside published VBench numbers: no official network was used."
    needed = _least_prompts(len(data.others))
    if data.is_compared and data.num_prompts < needed:
        few = f"under {needed} prompts no difference can be significant, and these are {data.num_prompts}"
        yield f"Too few prompts: {few}."
    elif data.num_prompts < _FEW_PROMPTS:
        yield f"{data.num_prompts} prompts are few: read the intervals, not the means."


def _least_prompts(num_compared: int) -> int:
    """Least number of prompts with which a sign test can reach 5 % after Holm's correction over so many policies."""
    return next(count for count in range(1, 99) if max(1, num_compared) * 2.0 ** (1 - count) <= LEVEL)


def _verdict(data: ReportData, label: str) -> Markup:
    words = {"up": "better in", "down": "worse in", "sig": "different in"}
    titles = {key: [item.title for item in data.headlines if item.verdict(label) == key] for key in words}
    parts = [f"{words[key]} {', '.join(found)}" for key, found in titles.items() if found]
    text = "; ".join(parts) or f"no difference to {data.baseline} that {data.num_prompts} prompts can show"
    return Markup("<strong>{}</strong>: {}.").format(label, text)


def _composites(data: ReportData) -> dict[str, Any]:
    scores = data.comparison.get("scores") or {}
    entries = {label: {name: (scores.get(label) or {}).get(name) for name in _COMPOSITES} for label in data.labels}
    found = [entry for own in entries.values() for entry in own.values() if entry]
    names = [name for name in _COMPOSITES if any(own[name] for own in entries.values())]
    values = {label: [finite((own[name] or {}).get("value")) for name in names] for label, own in entries.items()}
    return {
        "titles": [_COMPOSITES[name] for name in names],
        "values": values if any(finite(entry.get("value")) is not None for entry in found) else {},
        "reasons": sorted({str(entry["reason"]) for entry in found if entry.get("reason")}, key=len),
    }


def _panel(
    data: ReportData, measure: Measure, draw: figures.Draw, identity: str
) -> tuple[Measure, Markup | None, str]:
    """(measure, plot, values and intervals in words); no plot without a value."""
    is_difference = draw is figures.draw_differences
    if is_difference:
        estimates = {label: measure.difference(label) for label in data.others}
    else:
        estimates = {label: measure.level(label) for label in data.labels}
    known = any(estimate.value is not None for estimate in estimates.values())
    plot = figures.plot_svg(data, measure, draw, identity=identity) if known else None
    return measure, plot, _spoken(estimates, signed=is_difference)


def _spoken(estimates: Mapping[str, Estimate], *, signed: bool = False) -> str:
    digits = digits_for(estimates.values())
    parts = []
    for label, estimate in estimates.items():
        value = number(estimate.value, digits, signed=signed) or "not measured"
        parts.append(f"{label}: {value} ({interval(estimate, digits, signed=signed)})".removesuffix(" ()"))
    return "; ".join(parts)


def _moments(data: ReportData) -> list[tuple[str, bool]]:
    """(moment, whether its table is open) of the moments that any video reaches."""
    reached = [
        moment
        for moment in data.moments
        if any(item.level(label, moment).value is not None for item in data.headlines for label in data.labels)
    ]
    return [(moment, len(data.labels) <= _MANY_POLICIES or moment == reached[-1]) for moment in reached]


def _curves(data: ReportData) -> dict[str, Any] | None:
    measures = [measure for measure in data.measures.values() if measure.has_curve]
    if not measures:
        return None
    first = [measure for measure in data.headlines if measure.has_curve]
    drawn, points = [], 0
    for measure in sorted(measures, key=lambda measure: measure not in first):
        points += sum(len(measure.curve(label)) for label in data.labels)
        if points > _MAX_CURVE_POINTS and drawn:
            break
        drawn.append(measure)
    shown = (first or drawn)[0]
    drawn = [measure for measure in measures if measure in drawn]
    curves = [_curve(data, measure, f"curve{position}", measure is shown) for position, measure in enumerate(drawn)]
    return {
        "groups": [(family, list(group)) for family, group in groupby(curves, key=lambda curve: curve["family"])],
        "has_bands": len(data.labels) <= 5,
        "num_left": len(measures) - len(drawn),
        "left": f"{100 * figures.CURVE_LEFT:g}%",
        "right": f"{100 - 100 * figures.CURVE_RIGHT:g}%",
    }


def _curve(data: ReportData, measure: Measure, identity: str, is_shown: bool) -> dict[str, Any]:
    """A plot with the values for the readout under the pointer."""
    curves = figures.curve_points(measure, data.labels)
    times = sorted({time for points in curves.values() for time, _ in points})
    sample = [point for points in curves.values() for _, point in points[:: 1 + len(points) // 8]]
    digits = digits_for(Estimate.read(point) for point in sample)
    values = {}
    for label, points in curves.items():
        known = {time: finite(point.get("mean")) for time, point in points}
        values[label] = [None if (mean := known.get(time)) is None else round(mean, digits) for time in times]
    ends = {label: [value for value in own if value is not None] for label, own in values.items()}
    words = "; ".join(f"{label} from {own[0]} to {own[-1]}" for label, own in ends.items())
    return {
        "family": measure.family,
        "name": measure.name.removeprefix(f"{measure.family}/").replace("_", " "),
        "measure": measure,
        "identity": identity,
        "is_shown": is_shown,
        "plot": figures.plot_svg(data, measure, figures.draw_curve, identity=identity),
        "times": times,
        "end": max(point["end_s"] for points in curves.values() for _, point in points),
        "digits": digits,
        "values": {data.index(label): own for label, own in values.items()},
        "text": f"{measure.title} over time, first window to last: {words}.",
    }


def _scatter(data: ReportData) -> dict[str, Any] | None:
    motion, measure = data.first(MOTION), data.first(CONSISTENCY)
    if motion is None or measure is None:
        return None
    plot = figures.plot_svg(data, measure, partial(figures.draw_scatter, motion=motion), identity="scatter")
    spoken = (_spoken({label: item.level(label) for label in data.labels}) for item in (motion, measure))
    text = f"{motion.title} against {measure.title}, means: {' against '.join(spoken)}."
    return {"motion": motion, "measure": measure, "plot": plot, "text": text}


def _skipped(data: ReportData) -> list[tuple[bool, int, dict[tuple[str, str], list[str]]]]:
    """(whether these are drifts, number of measures, {(reason, policies): measures}) of what was not measured.

    Drifts stand apart, since they follow from the measures they are of.
    """
    blocks = []
    for is_drift in (False, True):
        grouped: dict[tuple[str, str], list[str]] = defaultdict(list)
        for (name, reason), labels in data.skipped.items():
            if name.startswith("drift/") == is_drift:
                who = "every policy" if len(labels) == len(data.labels) else ", ".join(labels)
                grouped[reason, who].append(name)
        if grouped:
            blocks.append((is_drift, len({name for names in grouped.values() for name in names}), grouped))
    return blocks


def _published(data: ReportData) -> dict[str, Any] | None:
    """Own official numbers and groups of published ones; None where no rows were given."""
    rows = [row for row in data.published if _PUBLISHED.keys() & row.numbers.keys()]
    if not rows:
        return None
    own = {label: _official_numbers(data, label) for label in data.labels}
    return {
        "columns": {name: title for name, title in _PUBLISHED.items() if any(name in row.numbers for row in rows)},
        "own": own if any(own.values()) else {},
        "groups": [list(group) for _, group in groupby(rows, key=lambda row: (row.table, row.source, row.protocol))],
    }


def _official_numbers(data: ReportData, label: str) -> dict[str, float]:
    found: dict[str, float] = {}
    scores: Mapping[str, Mapping[str, object]] = (data.comparison.get("scores") or {}).get(label) or {}
    for name in _PUBLISHED:
        measure = data.first((rf"vbench/(long/)?{name}",))
        value = measure.level(label).value if measure is not None else finite((scores.get(name) or {}).get("value"))
        if value is not None:
            found[name] = 100.0 * value
    return found
