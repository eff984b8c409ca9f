"""The report's page: one HTML document with styles, script, plots and pictures inside."""

import re
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from longtake.evaluation.comparison import LEVEL
from longtake.evaluation.metric import WINDOW_SECONDS
from longtake.evaluation.published import TAGS, Row
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
from longtake.evaluation.report.films import films_by_prompt
from longtake.evaluation.scores import QUALITY

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
_MANY_POLICIES = 8
"""Above this number the tables of moments are folded at first."""
_MAX_FLAGS = 200
"""Rows of the page's table of flags; the CSV file has all."""
_MAX_CURVE_POINTS = 80_000
"""Windows drawn over all figures; the curves of further measures are in curves.csv only."""
_NONE = "\u2013"


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """A table cell or column head; ``sort`` is the value that rows are ordered by."""

    text: str | Markup = ""
    small: Sequence[str] = ()
    items: Sequence[str] = ()
    sort: float | str | None = None
    title: str = ""
    css: str = ""
    verdict: str = ""
    tag: str = ""
    label: str = ""
    is_head: bool = False
    run: int | None = None
    share: float | None = None
    span: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Table:
    """A table that scrolls in a box of its own; a row is (index of its policy, cells)."""

    caption: str
    heads: Sequence[_Cell]
    rows: Sequence[tuple[int | None, Sequence[_Cell]]] = ()
    groups: Sequence[Sequence[tuple[int | None, Sequence[_Cell]]]] = ()
    foot: Sequence[_Cell] = ()
    css: str = ""
    is_sortable: bool = True


def render_page(data: ReportData, *, file_names: Sequence[str]) -> str:
    """Make the page.

    Args:
        data: Contents of the report.
        file_names: Files beside the page, relative to it.

    Returns:
        A whole HTML document.
    """
    environment = Environment(
        loader=PackageLoader("longtake.evaluation.report", package_path=""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["breakable"] = breakable
    asset = files("longtake.evaluation.report").joinpath
    style, script = (asset(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = b64encode(sha256(script.encode("utf-8")).digest()).decode("ascii")
    text = environment.get_template("page.html.j2").render(
        data=data,
        contents=_sections(data),
        style=Markup(colour_rules() + style),
        script=Markup(script),
        script_hash=digest,
        facts=_facts(data),
        fingerprint=_fingerprint(data),
        settings=list(_flatten(data.protocol)),
        file_names=file_names,
        families=_FAMILIES,
        verdicts=VERDICTS,
        tags=TAGS,
        window_seconds=WINDOW_SECONDS,
    )
    return plain_text(text.lstrip())


def breakable(text: object) -> Markup:
    """Mark where a long name may be broken: where its parts meet."""
    return Markup(re.sub(r"(?<=[_/+=,])(?=[A-Za-z0-9])|(?=\[)", "<wbr>", escape(text)))


def colour_rules() -> str:
    """Custom properties ``--h0`` to ``--h8`` for a style sheet, light by default and on paper."""

    def block(colours: tuple[str, ...], page: str) -> str:
        return ":root{--page:" + page + ";" + "".join(f"--h{i}:{c};" for i, c in enumerate(colours)) + "}"

    dark = f"@media screen and (prefers-color-scheme:dark){{{block(DARK, DARK_PAGE)}}}"
    classes = "".join(f".h{index}{{--c:var(--h{index})}}" for index in range(len(LIGHT)))
    return block(LIGHT, LIGHT_PAGE) + dark + classes


def _sections(data: ReportData) -> dict[str, Any]:
    """{section: its content}; one without content is not shown."""
    caption = "Means over all videos with 95 % intervals"
    if data.is_compared:
        caption += f"; \u25b2 \u25bc significantly better or worse than {data.baseline} (Holm, 5 %)"
    return {
        "summary": {
            "findings": list(_findings(data)),
            "table": _level_table(data, caption=caption, with_costs=True),
            "composites": _composites(data),
        },
        "differences": _panels(data),
        "moments": _moments(data),
        "curves": _curves(data),
        "motion": _scatter(data),
        "seams": _seams(data),
        "films": films_by_prompt(data),
        "costs": _cost_table(data),
        "flags": {"table": _flag_table(data) if data.flags else None},
        "all": _all_measures(data),
        "missing": _skipped(data),
        "published": _published(data),
        "method": {"commands": "\n".join(data.commands)},
    }


def _facts(data: ReportData) -> dict[str, str]:
    length = ""
    if data.seconds is not None:
        low, high = data.seconds
        length = f"{high:.3g} s each" if high - low < 0.5 else f"{low:.3g} to {high:.3g} s"
    facts = {
        "policies": str(len(data.labels)),
        "videos": str(data.num_videos),
        "prompts": f"{data.num_prompts}" + (f" \u00d7 {data.num_seeds} seeds" if data.num_seeds > 1 else ""),
        "length": length,
        "baseline": data.baseline if len(data.labels) > 1 else "",
        "protocol": f"{data.protocol.get('name') or ''} {_fingerprint(data)}".strip(),
    }
    return {name: fact for name, fact in facts.items() if fact}


def _fingerprint(data: ReportData) -> str:
    sources = [data.protocol, *(run.header for run in data.runs)]
    names = ("fingerprint", "hash", "protocol_hash")
    return next((source[name] for source in sources for name in names if isinstance(source.get(name), str)), "")


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
    needed = least_prompts(len(data.others))
    if data.is_compared and data.num_prompts < needed:
        few = f"under {needed} prompts no difference can be significant, and these are {data.num_prompts}"
        yield f"Too few prompts: {few}."
    elif data.num_prompts < _FEW_PROMPTS:
        yield f"{data.num_prompts} prompts are few: read the intervals, not the means."


def least_prompts(num_compared: int) -> int:
    """Least number of prompts with which a sign test can reach 5 % after Holm's correction over so many policies."""
    return next(count for count in range(1, 99) if max(1, num_compared) * 2.0 ** (1 - count) <= LEVEL)


def _verdict(data: ReportData, label: str) -> Markup:
    words = {"up": "better in", "down": "worse in", "sig": "different in"}
    titles = {key: [item.title for item in data.headlines if item.verdict(label) == key] for key in words}
    parts = [f"{words[key]} {', '.join(found)}" for key, found in titles.items() if found]
    text = "; ".join(parts) or f"no difference to {data.baseline} that {data.num_prompts} prompts can show"
    return Markup("<strong>{}</strong>: {}.").format(label, text)


def _policy_cell(data: ReportData, label: str) -> _Cell:
    small = ("baseline",) if label == data.baseline and len(data.labels) > 1 else ()
    return _Cell(text=label, label=label, small=small, sort=label, is_head=True)


def _none_cell(reason: str) -> _Cell:
    """A cell without a number, with the reason as its tooltip; the page has a table of all reasons."""
    return _Cell(text="not measured", title=reason, css="none")


def _policy_table(data: ReportData, caption: str, heads: Sequence[_Cell], cells: Any, **options: Any) -> _Table:
    """A row per policy; ``cells`` makes the cells of a label."""
    rows = [(data.index(label), [_policy_cell(data, label), *cells(label)]) for label in data.labels]
    return _Table(caption=caption, heads=[_Cell(text="policy", css="text"), *heads], rows=rows, **options)


def _level_table(data: ReportData, *, caption: str, moment: str | None = None, with_costs: bool = False) -> _Table:
    """Policies against headline measures over whole videos or at a moment, with the main costs in the last columns."""
    measures = [item for item in data.headlines if moment is None or moment in item.moments]
    digits = {item.name: digits_for(item.level(label, moment) for label in data.labels) for item in measures}
    costs = {name: title for name, title in data.costs.items() if with_costs and name in MAIN_COSTS}

    def cells(label: str) -> list[_Cell]:
        levels = [_level_cell(data, item, label, moment, digits[item.name]) for item in measures]
        return levels + [_cost_cell(data, label, name) for name in costs]

    heads = [_measure_head(item) for item in measures] + [
        _Cell(text=title, small=("cost",)) for title in costs.values()
    ]
    foot = _detectable_row(data, measures, moment) + [_Cell()] * len(costs) if data.is_compared else []
    return _policy_table(data, caption, heads, cells, foot=foot)


def _measure_head(measure: Measure) -> _Cell:
    arrow = {1: "\u00a0\u2191", -1: "\u00a0\u2193", 0: ""}[measure.direction]
    small = [f"{measure.place} {measure.unit}".strip(), f"[{measure.backbone}]" if measure.backbone else ""]
    return _Cell(
        text=measure.title + arrow,
        small=[line for line in small if line],
        title=f"{measure.name}: {measure.direction_text}",
    )


def _level_cell(data: ReportData, measure: Measure, label: str, moment: str | None, digits: int) -> _Cell:
    level = measure.level(label, moment)
    if level.value is None:
        return _none_cell(level.reason)
    verdict = measure.verdict(label, moment) if label != data.baseline else ""
    small = [text] if (text := interval(level, digits)) else []
    text = number(level.value, digits)
    return _Cell(text=text, small=small, sort=f"{level.value:.6g}", verdict=verdict, css=verdict)


def _detectable_row(data: ReportData, measures: Sequence[Measure], moment: str | None) -> list[_Cell]:
    """The smallest difference that the comparison could have found, of the policy where it is largest."""
    title = "80 % power, two-sided 5 %"
    cells = [_Cell(text="smallest difference that could be found", is_head=True, title=title)]
    for measure in measures:
        known = [finite(measure.difference(label, moment).extra.get("minimum_detectable")) for label in data.others]
        sizes = [Estimate(value=value) for value in known if value is not None]
        largest = max((item.value or 0.0 for item in sizes), default=None)
        if largest:
            cells.append(_Cell(text=number(largest, digits_for(sizes, figures=2))))
        else:
            why = "not known from one prompt" if largest is None else "not known: every prompt has the same difference"
            cells.append(_Cell(text=_NONE, title=why))
    return cells


def _cost_table(data: ReportData) -> _Table | None:
    def cells(label: str) -> list[_Cell]:
        return [_cost_cell(data, label, name, with_bar=True) for name in data.costs]

    caption = "Costs of each policy on the machine that made the videos"
    heads = [_Cell(text=title) for title in data.costs.values()]
    return _policy_table(data, caption, heads, cells, css="costs") if data.costs else None


def _cost_cell(data: ReportData, label: str, name: str, *, with_bar: bool = False) -> _Cell:
    """A cost with the same digits for all policies; a bar shows its share of the largest."""
    run = data.run(label)
    value = None if run is None else finite(run.costs.get(name))
    if value is None:
        return _none_cell("not recorded for this run")
    known = [finite(other.costs.get(name)) for other in data.runs]
    largest = max(abs(item) for item in known if item is not None)
    digits = 0 if largest >= 100 else 1 if largest >= 10 else 2
    share = (round(100 * abs(value) / largest) if largest else 0) if with_bar else None
    return _Cell(text=number(value, digits), sort=f"{value:.6g}", css="cost", share=share)


def _composites(data: ReportData) -> _Table | list[str] | None:
    """Composite scores, or the reasons why there are none; None where the comparison has none."""
    scores = {label: (data.comparison.get("scores") or {}).get(label) or {} for label in data.labels}
    names = [name for name in _COMPOSITES if any(name in own for own in scores.values())]
    entries = {(label, name): scores[label].get(name) or {} for label in data.labels for name in names}
    values = {key: finite(entry.get("value")) for key, entry in entries.items()}
    if not names:
        return None
    if all(value is None for value in values.values()):
        return sorted({entry["reason"] for entry in entries.values() if entry.get("reason")}, key=len)

    def cell(label: str, name: str) -> _Cell:
        value = values[label, name]
        if value is None:
            return _none_cell(str(entries[label, name].get("reason") or name))
        return _Cell(text=number(value, 4), sort=f"{value:.6g}")

    caption = "VBench's composite scores, only where every member was measured with the official backbone"
    heads = [_Cell(text=_COMPOSITES[name]) for name in names]
    return _policy_table(data, caption, heads, lambda label: [cell(label, name) for name in names])


def _panels(data: ReportData) -> list[tuple[Measure, Markup | None, str]]:
    """(measure, plot, its text) of the differences to the baseline."""
    panels = []
    for position, measure in enumerate(data.headlines if data.is_compared else ()):
        estimates = {label: measure.difference(label) for label in data.others}
        known = any(estimate.value is not None for estimate in estimates.values())
        identity = f"difference{position}"
        plot = figures.rows_svg(data, measure, figures.draw_differences, identity=identity) if known else None
        panels.append((measure, plot, _spoken(estimates, signed=True)))
    return panels


def _seams(data: ReportData) -> tuple[Measure, Markup, str] | None:
    measure = data.first(SEAMS)
    if measure is None:
        return None
    plot = figures.rows_svg(data, measure, figures.draw_levels, identity="seamrows")
    return measure, plot, _spoken({label: measure.level(label) for label in data.labels})


def _spoken(estimates: Mapping[str, Estimate], *, signed: bool = False) -> str:
    """Values and intervals of a plot in words."""
    digits = digits_for(estimates.values())
    parts = []
    for label, estimate in estimates.items():
        inside = interval(estimate, digits, signed=signed)
        value = number(estimate.value, digits, signed=signed) or "not measured"
        parts.append(f"{label}: {value}" + (f" ({inside})" if inside else ""))
    return "; ".join(parts)


def _moments(data: ReportData) -> list[tuple[str, _Table, bool]]:
    """(moment, table, whether it is open) of the moments that any video reaches."""
    tables = [
        (
            moment,
            _level_table(data, caption=f"At {moment} s: means over the five seconds that end there", moment=moment),
        )
        for moment in data.moments
        if any(item.level(label, moment).value is not None for item in data.headlines for label in data.labels)
    ]
    is_short = len(data.labels) <= _MANY_POLICIES
    return [(moment, table, is_short or table is tables[-1][1]) for moment, table in tables]


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
        "plot": figures.curve_svg(data, measure, identity=identity),
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
    plot = figures.scatter_svg(data, measure, motion)
    spoken = (_spoken({label: item.level(label) for label in data.labels}) for item in (motion, measure))
    text = f"{motion.title} against {measure.title}, means: {' against '.join(spoken)}."
    return {"motion": motion, "measure": measure, "plot": plot, "text": text}


def _all_measures(data: ReportData) -> list[tuple[str, int, bool, _Table]]:
    """(family, number of measures, whether it is open, table) with a row per measure and a column per policy."""
    heads = [_Cell(text="measure", css="text")]
    heads += [_Cell(text=label, label=label, run=data.index(label)) for label in data.labels]
    blocks = []
    for family, group in groupby(data.measures.values(), key=lambda measure: measure.family):
        measures = list(group)
        caption = f"{family}/: {_FAMILIES.get(family, '')}"
        rows = [(None, _measure_row(data, measure)) for measure in measures]
        is_open = family not in ("drift", "set") and len(measures) * len(data.labels) <= 200
        blocks.append((family, len(measures), is_open, _Table(caption=caption, heads=heads, rows=rows, css="all")))
    return blocks


def _measure_row(data: ReportData, measure: Measure) -> list[_Cell]:
    formula, description = measure.spec.get("formula"), measure.spec.get("description")
    notes = [formula and f"formula {formula}", measure.unit, measure.direction_text, description]
    title = " \u00b7 ".join(str(note) for note in notes if note)
    cells = [_Cell(text=breakable(measure.name), is_head=True, title=title, sort=measure.name)]
    levels = {label: measure.level(label) for label in data.labels}
    digits = digits_for(levels.values())
    for label, level in levels.items():
        run = data.index(label)
        if level.value is None:
            cells.append(_Cell(text=_NONE, title=level.reason, css="none", run=run))
            continue
        verdict = measure.verdict(label) if label != data.baseline else ""
        sort, inside, text = f"{level.value:.6g}", interval(level, digits), number(level.value, digits)
        cells.append(_Cell(text=text, sort=sort, title=inside, css=verdict, verdict=verdict, run=run))
    return cells


def _flag_table(data: ReportData) -> _Table:
    heads = [_Cell(text=name, css="text") for name in ("policy", "video", "kind")]
    heads += [
        _Cell(text="from, s"),
        _Cell(text="to, s"),
        _Cell(text="finding", css="text"),
        _Cell(text="prompt", css="text"),
    ]
    rows = []
    for label, video, prompt, kind, start, end, message in data.flags[:_MAX_FLAGS]:
        words = [_Cell(text=text, sort=text, css="text") for text in (video, kind)]
        times = [_Cell(text=f"{time:.1f}", sort=time) for time in (start, end)]
        long = [_Cell(text=text, sort=text, css="text wide") for text in (message, prompt)]
        rows.append((data.index(label), [_policy_cell(data, label), *words, *times, *long]))
    more = f"; the first {_MAX_FLAGS} of {len(data.flags)}, all in flags.csv" if len(data.flags) > _MAX_FLAGS else ""
    return _Table(caption=f"Videos that stand still, repeat themselves, cut or flicker{more}", heads=heads, rows=rows)


def _skipped(data: ReportData) -> dict[str, Any] | None:
    """Tables of what was not measured; drift numbers apart, which follow from the measures they are of."""
    drift = {key: labels for key, labels in data.skipped.items() if key[0].startswith("drift/")}
    others = {key: labels for key, labels in data.skipped.items() if key not in drift}
    if not data.skipped:
        return None
    return {
        "table": _skipped_table(data, others) if others else None,
        "drift": _skipped_table(data, drift) if drift else None,
        "num_drift": len({name for name, _ in drift}),
    }


def _skipped_table(data: ReportData, skipped: Mapping[tuple[str, str], Sequence[str]]) -> _Table:
    """Measures that lack the same thing share a row."""
    grouped: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for (name, reason), labels in skipped.items():
        grouped[reason, tuple(labels)].append(name)
    rows = []
    for (reason, labels), names in grouped.items():
        who = "every policy" if len(labels) == len(data.labels) else ", ".join(labels)
        cells = [
            _Cell(items=names, css="text names"),
            _Cell(text=reason, css="text wide"),
            _Cell(text=who, css="text"),
        ]
        rows.append((None, cells))
    heads = [_Cell(text=name, css="text") for name in ("measure", "why", "for")]
    return _Table(
        caption="None of these was counted as zero", heads=heads, rows=rows, css="skipped", is_sortable=False
    )


def _published(data: ReportData) -> dict[str, Any] | None:
    """Own official numbers above published ones; None where no rows were given."""
    rows = [row for row in data.published if _PUBLISHED.keys() & row.numbers.keys()]
    if not rows:
        return None
    columns = [name for name in _PUBLISHED if any(name in row.numbers for row in rows)]
    own = {label: official_numbers(data, label) for label in data.labels}
    mine = []
    for label, numbers in own.items():
        cells = [_Cell(text=f"{numbers[name]:.2f}" if name in numbers else _NONE) for name in columns]
        mine.append((None, [_policy_cell(data, label), *cells]))
    groups = groupby(rows, key=lambda row: (row.table, row.source, row.protocol))
    heads = [_Cell(text=title) for title in ("model", *(_PUBLISHED[name] for name in columns))]
    table = _Table(
        caption="VBench numbers in percent",
        heads=heads,
        rows=mine if any(own.values()) else [],
        groups=[_published_rows(list(group), columns) for _, group in groups],
        css="published",
        is_sortable=False,
    )
    return {"table": table, "has_own": any(own.values())}


def official_numbers(data: ReportData, label: str) -> dict[str, float]:
    """{column: percent} of a policy, official numbers only."""
    found: dict[str, float] = {}
    scores: Mapping[str, Mapping[str, object]] = (data.comparison.get("scores") or {}).get(label) or {}
    for name in _PUBLISHED:
        measure = data.first((rf"vbench/(long/)?{name}",))
        value = measure.level(label).value if measure is not None else finite((scores.get(name) or {}).get("value"))
        if value is not None:
            found[name] = 100.0 * value
    return found


def _published_rows(rows: Sequence[Row], columns: Iterable[str]) -> list[tuple[None, list[_Cell]]]:
    first, columns = rows[0], list(columns)
    length = f"{first.seconds:g} s" if first.seconds is not None else "unknown length"
    source = f"{first.source}, {length}. {first.protocol}."
    lines = [(None, [_Cell(text=source, css="source", is_head=True, span=len(columns) + 1)])]
    for row in rows:
        cells = [_Cell(text=row.model, is_head=True, title=row.note)]
        for name in columns:
            found = row.numbers.get(name)
            cells.append(_Cell(text=_NONE) if found is None else _Cell(text=f"{found.value:.2f}", tag=found.tag))
        lines.append((None, cells))
    return lines
