"""Tables of a report: policies against measures with their intervals, costs, flags, and what is missing."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from longtake.evaluation.report.data import (
    MAIN_COSTS,
    Estimate,
    Measure,
    ReportData,
    digits_for,
    finite,
    interval,
    number,
)
from longtake.evaluation.report.markup import Content, Markup, breakable, join, tag
from longtake.evaluation.report.pieces import swatch
from longtake.evaluation.report.plots import verdict_mark, verdict_of

SCORES = {"quality7": "Quality (7 dimensions)", "quality6_long": "Quality (6, long)", "total": "Total"}
MAX_FLAGS = 200
"""Rows of the page's table of flags; the CSV file has all."""


def scrolled_table(caption: str, heads: Content, *bodies: Content, class_: str | None = None) -> Markup:
    """A table in a box of its own, in which it scrolls by touch or with the arrow keys where it is wide.

    Args:
        caption: What the table holds.
        heads: Of its columns.
        bodies: ``tbody`` and ``tfoot`` elements.
        class_: Of the table.
    """
    above = tag("caption", tag("span", caption))
    table = tag("table", above, tag("thead", tag("tr", heads)), bodies, class_=class_)
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=caption)


def sortable(*content: Content, is_text: bool = False, **attributes: object) -> Markup:
    """A column's head that sorts the table when it is pressed."""
    button = tag("button", tag("span", *content), class_="sort", type="button")
    return tag("th", button, scope="col", class_="text" if is_text else None, **attributes)


def policy_head(data: ReportData, label: str) -> Markup:
    """A row's head: the policy's sign and name."""
    base = tag("small", "baseline") if label == data.baseline and len(data.labels) > 1 else None
    name = tag("span", label, class_="label")
    return tag("th", swatch(data.style(label)), name, base, scope="row", data_v=label)


def none_cell(reason: str) -> Markup:
    """A cell without a number, with the reason under the pointer; it is told in full elsewhere on the page."""
    return tag("td", tag("span", "not measured", title=reason), class_="none")


def level_cell(level: Estimate, digits: int, *, difference: Estimate | None, direction: int) -> Markup:
    """A mean over its interval; behind it the sign of a significant difference to the baseline."""
    if level.value is None:
        return none_cell(level.reason)
    verdict = verdict_of(difference, direction) if difference is not None else ""
    value = tag("span", number(level.value, digits), class_="value")
    small = tag("small", interval(level, digits)) if level.low is not None else None
    return tag("td", value, verdict_mark(verdict), " ", small, class_=verdict or None, data_v=f"{level.value:.6g}")


def measure_head(measure: Measure) -> Markup:
    """A column's head: title over prefix, stand-in and direction."""
    arrow = {1: "\u00a0\u2191", -1: "\u00a0\u2193", 0: ""}[measure.direction]
    title = tag("b", measure.title, arrow)
    small = tag("small", breakable(measure.place), f" {measure.unit}" if measure.unit else None)
    stand_in = tag("small", breakable(f"[{measure.backbone}]")) if measure.backbone else None
    return sortable(title, small, stand_in, title=f"{measure.name}: {measure.direction_text}")


def level_table(data: ReportData, *, caption: str, moment: str | None = None, with_costs: bool = False) -> Markup:
    """Policies against headline measures: over whole videos or at a moment.

    Args:
        data: Of the report.
        caption: Of the table.
        moment: Seconds, as the comparison names them; None for whole videos.
        with_costs: Whether the main costs stand in the last columns.
    """
    measures = data.headlines if moment is None else [item for item in data.headlines if moment in item.moments]
    digits = {item.name: digits_for(item.level(label, moment) for label in data.labels) for item in measures}
    costs = {name: title for name, title in data.costs.items() if with_costs and name in MAIN_COSTS}
    heads = [sortable("policy", is_text=True), *(measure_head(item) for item in measures)]
    heads += [sortable(tag("b", title), tag("small", "cost")) for title in costs.values()]
    rows = []
    for label in data.labels:
        cells = [
            level_cell(
                item.level(label, moment),
                digits[item.name],
                difference=item.difference(label, moment) if label != data.baseline else None,
                direction=item.direction,
            )
            for item in measures
        ]
        cells += [cost_cell(data, label, name) for name in costs]
        rows.append(tag("tr", policy_head(data, label), cells, data_run=data.index(label)))
    foot = _detectable_row(data, measures, moment, len(costs)) if data.others and data.baseline else None
    return scrolled_table(caption, heads, tag("tbody", rows), foot)


def _detectable_row(data: ReportData, measures: Sequence[Measure], moment: str | None, num_costs: int) -> Markup:
    """The smallest difference that the comparison could have found, of the policy where it is largest."""
    cells = []
    for measure in measures:
        differences = [measure.difference(label, moment) for label in data.others]
        known = [finite(item.extra.get("minimum_detectable")) for item in differences]
        sizes = [Estimate(value=value) for value in known if value is not None]
        if not sizes:
            cells.append(tag("td", "\u2013", title="not known from one prompt"))
            continue
        largest = max(item.value or 0.0 for item in sizes)
        if largest == 0.0:
            cells.append(tag("td", "\u2013", title="not known: every prompt has the same difference"))
            continue
        cells.append(tag("td", number(largest, digits_for(sizes, figures=2))))
    head = tag("th", "smallest difference that could be found", scope="row", title="80 % power, two-sided 5 %")
    return tag("tfoot", tag("tr", head, cells, [tag("td") for _ in range(num_costs)]))


def cost_cell(data: ReportData, label: str, name: str, *, with_bar: bool = False) -> Markup:
    """A cost, alike in digits over the policies; a bar shows its share of the largest."""
    run = data.run(label)
    value = None if run is None else finite(run.costs.get(name))
    if value is None:
        return none_cell("not recorded for this run")
    known = [finite(other.costs.get(name)) for other in data.runs]
    largest = max(abs(item) for item in known if item is not None)
    digits = 0 if largest >= 100 else 1 if largest >= 10 else 2
    share = 100 * abs(value) / largest if largest else 0.0
    bar = tag("i", class_="share", style=f"width:{share:.0f}%") if with_bar else None
    return tag("td", tag("span", number(value, digits), class_="value"), bar, class_="cost", data_v=f"{value:.6g}")


def cost_table(data: ReportData) -> Markup:
    """What every policy costs."""
    heads = [sortable("policy", is_text=True), *(sortable(tag("b", title)) for title in data.costs.values())]
    rows = [
        tag(
            "tr",
            policy_head(data, label),
            [cost_cell(data, label, name, with_bar=True) for name in data.costs],
            data_run=data.index(label),
        )
        for label in data.labels
    ]
    caption = "What each policy costs, on the machine that made the videos"
    return scrolled_table(caption, heads, tag("tbody", rows), class_="costs")


def score_table(data: ReportData) -> Markup | None:
    """Composite scores, or why there are none; None where the comparison has none."""
    scores = data.comparison.get("scores") or {}
    names = [name for name in SCORES if any(name in (scores.get(label) or {}) for label in data.labels)]
    if not names:
        return None
    reasons = {str(entry.get("reason")) for label in data.labels for entry in _scores(scores, label, names).values()}
    values = [finite(e.get("value")) for label in data.labels for e in _scores(scores, label, names).values()]
    if all(value is None for value in values):
        items = [tag("li", breakable(reason)) for reason in sorted(reasons, key=len) if reason != "None"]
        text = "No composite VBench score: members are missing, or were not measured with VBench's own networks"
        summary = tag("summary", text, class_="quiet")
        return tag("details", summary, tag("ul", items, class_="quiet"), class_="scores")
    heads = [sortable("policy", is_text=True), *(sortable(tag("b", SCORES[name])) for name in names)]
    rows = []
    for label in data.labels:
        cells = []
        for name, entry in _scores(scores, label, names).items():
            value = finite(entry.get("value"))
            known = tag("td", number(value, 4), data_v=f"{value:.6g}") if value is not None else None
            cells.append(known or none_cell(str(entry.get("reason") or name)))
        rows.append(tag("tr", policy_head(data, label), cells, data_run=data.index(label)))
    caption = "VBench's composite scores, only where every member was measured with the official backbone"
    return scrolled_table(caption, heads, tag("tbody", rows))


def _scores(scores: Mapping[str, Any], label: str, names: Iterable[str]) -> dict[str, Mapping[str, Any]]:
    return {name: (scores.get(label) or {}).get(name) or {} for name in names}


def measure_table(data: ReportData, measures: Sequence[Measure], *, caption: str) -> Markup:
    """Every measure in a row, every policy in a column."""
    heads = [sortable("measure", is_text=True)]
    heads += [
        sortable(swatch(data.style(label)), tag("b", label), data_run=data.index(label)) for label in data.labels
    ]
    rows = []
    for measure in measures:
        levels = [measure.level(label) for label in data.labels]
        digits = digits_for(levels)
        cells = []
        for label, level in zip(data.labels, levels, strict=True):
            run = data.index(label)
            if level.value is None:
                cells.append(tag("td", tag("span", "\u2013", title=level.reason), class_="none", data_run=run))
                continue
            verdict = verdict_of(measure.difference(label), measure.direction) if label != data.baseline else ""
            text = (number(level.value, digits), verdict_mark(verdict))
            inside = interval(level, digits) or None
            attributes = {"data_run": run, "data_v": f"{level.value:.6g}", "title": inside, "class_": verdict or None}
            cells.append(tag("td", text, **attributes))
        rows.append(tag("tr", _measure_row_head(measure), cells))
    return scrolled_table(caption, heads, tag("tbody", rows), class_="all")


def _measure_row_head(measure: Measure) -> Markup:
    formula = measure.spec.get("formula")
    notes = [formula and f"formula {formula}", measure.unit, measure.direction_text, measure.spec.get("description")]
    title = " \u00b7 ".join(str(note) for note in notes if note)
    return tag("th", breakable(measure.name), scope="row", title=title, data_v=measure.name)


def flag_table(data: ReportData, rows: Sequence[tuple[str, str, str, str, float, float, str]]) -> Markup:
    """Videos with something wrong: (label, video, prompt, kind, start, end, message)."""
    heads = [sortable(name, is_text=name not in ("from, s", "to, s")) for name in ("policy", "video", "kind")]
    heads += [sortable("from, s"), sortable("to, s"), sortable("what", is_text=True), sortable("prompt", is_text=True)]
    body = [
        tag(
            "tr",
            policy_head(data, label),
            tag("td", video, class_="text", data_v=video),
            tag("td", kind, class_="text", data_v=kind),
            tag("td", f"{start:.1f}", data_v=start),
            tag("td", f"{end:.1f}", data_v=end),
            tag("td", message, class_="text wide", data_v=message),
            tag("td", prompt, class_="text wide", data_v=prompt),
            data_run=data.index(label),
        )
        for label, video, prompt, kind, start, end, message in rows[:MAX_FLAGS]
    ]
    more = f"; the first {MAX_FLAGS} of {len(rows)}, all in flags.csv" if len(rows) > MAX_FLAGS else ""
    caption = f"Videos that stand still, repeat themselves, cut or flicker{more}"
    return scrolled_table(caption, heads, tag("tbody", body))


def skipped_tables(data: ReportData) -> list[Markup]:
    """What was not measured, and why; drift numbers apart, which follow from the measures they are of."""
    drift = {key: labels for key, labels in data.skipped.items() if key[0].startswith("drift/")}
    others = {key: labels for key, labels in data.skipped.items() if key not in drift}
    tables = [_skipped_table(data, others)] if others else []
    if drift:
        summary = tag("summary", tag("code", "drift/"), f" {len({name for name, _ in drift})}")
        tables.append(tag("details", summary, _skipped_table(data, drift)))
    return tables


def _skipped_table(data: ReportData, skipped: Mapping[tuple[str, str], Sequence[str]]) -> Markup:
    """Measures that lack the same thing share a row."""
    grouped: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (name, reason), labels in skipped.items():
        grouped.setdefault((reason, tuple(labels)), []).append(name)
    rows = []
    for (reason, labels), names in grouped.items():
        who = "every policy" if len(labels) == len(data.labels) else ", ".join(labels)
        items = [tag("li", breakable(name)) for name in names]
        cells = (tag("td", tag("ul", items), class_="text names"), tag("td", reason, class_="text wide"))
        rows.append(tag("tr", cells, tag("td", who, class_="text")))
    heads = [tag("th", name, scope="col", class_="text") for name in ("measure", "why", "for")]
    caption = "None of these was counted as zero"
    return scrolled_table(caption, heads, tag("tbody", rows), class_="skipped")


def mapping_list(values: Mapping[str, Any], *, prefix: str = "") -> Markup:
    """Nested settings as a flat list of dotted names and values."""
    pairs = list(_flatten(values, prefix))
    return tag("dl", [join(tag("dt", name), tag("dd", tag("code", text))) for name, text in pairs], class_="settings")


def _flatten(values: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            listed = isinstance(value, list | tuple)
            yield f"{prefix}{key}", ", ".join(str(item) for item in value) if listed else str(value)
