"""Published numbers beside a report's own: context in grey, with where each was read and under which protocol."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from longtake.evaluation.published import TAGS, Number, Row
from longtake.evaluation.report.data import ReportData, finite
from longtake.evaluation.report.markup import Content, Markup, tag
from longtake.evaluation.report.tables import policy_head, scrolled_table
from longtake.evaluation.scores import QUALITY

COLUMNS = {
    **{name: name.replace("_", " ") for name in QUALITY},
    "overall_consistency": "overall consistency",
    "quality7": "Quality, 7",
    "quality6_long": "Quality, 6",
    "semantic": "Semantic",
    "total": "Total",
}
"""Columns of published tables that a report can set its own numbers beside, in percent, and their titles."""


def published_section(data: ReportData) -> tuple[str, str, Content] | None:
    """Own official numbers above published ones; None where no rows were given."""
    rows = [row for row in data.published if COLUMNS.keys() & row.numbers.keys()]
    if not rows:
        return None
    columns = [name for name in COLUMNS if any(name in row.numbers for row in rows)]
    own = {label: own_numbers(data, label) for label in data.labels}
    mine = [tag("tr", policy_head(data, label), _own_cells(own[label], columns)) for label in data.labels]
    has_own = any(own.values())
    text = (
        "Grey: as printed elsewhere, for context. Prompts, their extension, the rule that cuts videos into clips, and "
        "the codec differ and are rarely stated; the same weights span two points of Total between papers. "
    )
    own_names = "Own rows hold only numbers under vbench/, those of vbench/long/ where there are such."
    mark = own_names if has_own else "This report has no number that may stand here."
    heads = [tag("th", title, scope="col") for title in ("model", *(COLUMNS[name] for name in columns))]
    bodies = [tag("tbody", mine)] if has_own else []
    for _, group in groupby(rows, key=lambda row: (row.table, row.source, row.protocol)):
        bodies.append(_table_body(list(group), columns))
    tags = tag("p", "Superscripts: ", "; ".join(f"{key}, {words}" for key, words in TAGS.items()), ".", class_="quiet")
    caption = "VBench numbers in percent"
    table = scrolled_table(caption, heads, bodies, class_="published")
    return "published", "Published numbers", [tag("p", text, mark, class_="note"), table, tags]


def own_numbers(data: ReportData, label: str) -> dict[str, float]:
    """{column: percent} of a policy, official numbers only."""
    found: dict[str, float] = {}
    scores: Mapping[str, Mapping[str, object]] = (data.comparison.get("scores") or {}).get(label) or {}
    for name in COLUMNS:
        measure = data.first((rf"vbench/(long/)?{name}",))
        value = measure.level(label).value if measure is not None else finite((scores.get(name) or {}).get("value"))
        if value is not None:
            found[name] = 100.0 * value
    return found


def _own_cells(numbers: Mapping[str, float], columns: Sequence[str]) -> list[Markup]:
    return [tag("td", f"{numbers[name]:.2f}" if name in numbers else "\u2013") for name in columns]


def _table_body(rows: Sequence[Row], columns: Sequence[str]) -> Markup:
    first = rows[0]
    length = f"{first.seconds:g} s" if first.seconds is not None else "unknown length"
    source = (tag("strong", first.source), f", {length}. {first.protocol}.")
    head = tag("tr", tag("th", source, colspan=len(columns) + 1, scope="colgroup", class_="source"))
    lines = [
        tag(
            "tr",
            tag("th", row.model, scope="row", title=row.note or None),
            [_cell(row.numbers.get(name)) for name in columns],
        )
        for row in rows
    ]
    return tag("tbody", head, lines, class_="theirs")


def _cell(number: Number | None) -> Markup:
    if number is None:
        return tag("td", "\u2013")
    return tag("td", f"{number.value:.2f}", tag("sup", number.tag, title=TAGS[number.tag]))
