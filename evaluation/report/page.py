"""The report's page: one HTML document with style, script and pictures inside, which asks the network for nothing."""

from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from importlib.resources import files

from longtake.evaluation.comparison import LEVEL
from longtake.evaluation.metric import WINDOW_SECONDS
from longtake.evaluation.report.colours import colour_rules
from longtake.evaluation.report.curves import curve_figure
from longtake.evaluation.report.data import CONSISTENCY, MOTION, SEAMS, Estimate, Measure, ReportData
from longtake.evaluation.report.files import FlagRow
from longtake.evaluation.report.films import film_section
from longtake.evaluation.report.markup import Content, Markup, join, tag
from longtake.evaluation.report.pieces import marker_definitions, measure_title, swatch
from longtake.evaluation.report.plots import interval_rows, scatter_figure, verdict_of
from longtake.evaluation.report.published import published_section
from longtake.evaluation.report.tables import (
    cost_table,
    flag_table,
    level_table,
    mapping_list,
    measure_table,
    score_table,
    skipped_tables,
)

FAMILIES = {
    "vbench": "VBench's formula with VBench's own network, or none needed: may stand beside published numbers made "
    "under the same protocol",
    "vbench_form": "VBench's formula with a stand-in network: compare within this page only",
    "proxy": "our own measures, no network",
    "drift": "how another measure changes from the start of a video to its end",
    "set": "a property of the whole set of videos",
    "judge": "the bundled judge of the mini model's world",
}
FEW_PROMPTS = 10
MANY_POLICIES = 8
"""From here on the page shows less at first: tables of moments are folded."""
MAX_CURVE_POINTS = 80_000
"""Windows drawn over all figures; the curves of further measures are in curves.csv only. About 35 bytes each."""


def render_page(
    data: ReportData, *, flags: Sequence[FlagRow], file_names: Sequence[str], notes: Sequence[str] = ()
) -> str:
    """Make the page.

    Args:
        data: Of the report.
        flags: Of the videos.
        file_names: Of the files beside the page, relative to it.
        notes: Said at its end: what could not be written, for example.

    Returns:
        A whole HTML document.
    """
    asset = files("longtake.evaluation.report").joinpath
    style, script = (asset(name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    sections = [section for section in _sections(data, flags, file_names, notes) if section is not None]
    contents = [tag("a", title, href=f"#{identity}") for identity, title, _ in sections]
    parts = [tag("section", tag("h2", title), body, id=identity) for identity, title, body in sections]
    body = tag(
        "body",
        marker_definitions(),
        tag("header", _title(data), tag("nav", contents, aria_label="sections")),
        _policy_bar(data) if len(data.labels) > 1 else None,
        tag("main", parts),
        tag("script", Markup(script)),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        _policy_of_content(script),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"Evaluation: {', '.join(data.labels[:4])}{' and more' if len(data.labels) > 4 else ''}"),
        tag("style", Markup(colour_rules() + style)),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _policy_of_content(script: str) -> Markup:
    """Nothing is loaded, and no script runs but ours: its hash stands here."""
    digest = b64encode(sha256(script.encode("utf-8")).digest()).decode("ascii")
    rules = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return Markup(f'<meta http-equiv="Content-Security-Policy" content="{rules}">')


Section = tuple[str, str, Content]
"""(id, title, content)."""


def _sections(
    data: ReportData, flags: Sequence[FlagRow], file_names: Sequence[str], notes: Sequence[str]
) -> list[Section | None]:
    films = film_section(data)
    return [
        ("summary", "Summary", _summary(data, flags)),
        _differences(data),
        _moments(data),
        _curves(data),
        _scatter(data),
        _seams(data),
        ("films", "Filmstrips", [_films_note(data), films]) if films else None,
        ("costs", "Costs", cost_table(data)) if data.costs else None,
        ("flags", "Flagged videos", _flags(data, flags)),
        ("all", "Every measure", _all_measures(data)),
        ("missing", "Not measured", skipped_tables(data)) if data.skipped else None,
        published_section(data),
        ("method", "How this was made", _method(data, file_names, notes)),
    ]


def _title(data: ReportData) -> Markup:
    name = str(data.protocol.get("name") or "")
    facts = {
        "policies": str(len(data.labels)),
        "videos": str(data.num_videos),
        "prompts": f"{data.num_prompts}" + (f" \u00d7 {data.num_seeds} seeds" if data.num_seeds > 1 else ""),
        "length": _length(data),
        "baseline": data.baseline if len(data.labels) > 1 else "",
        "protocol": " ".join(part for part in (name, fingerprint(data)) if part),
    }
    pairs = [tag("div", tag("dt", key), tag("dd", value)) for key, value in facts.items() if value]
    return join(tag("p", "longtake", class_="brand"), tag("h1", "Evaluation"), tag("dl", pairs, class_="facts"))


def fingerprint(data: ReportData) -> str:
    """Of the protocol, as it says itself or as the runs do; empty if neither does."""
    sources = [data.protocol, *(run.header for run in data.runs)]
    names = ("fingerprint", "hash", "protocol_hash")
    found = [source[name] for source in sources for name in names if isinstance(source.get(name), str)]
    return found[0] if found else ""


def _length(data: ReportData) -> str:
    if data.seconds is None:
        return ""
    low, high = data.seconds
    return f"{high:.3g} s each" if high - low < 0.5 else f"{low:.3g} to {high:.3g} s"


def _policy_bar(data: ReportData) -> Markup:
    buttons = [
        tag(
            "button",
            swatch(data.style(label)),
            tag("span", label),
            type="button",
            class_="run",
            aria_pressed="true",
            data_toggle=data.index(label),
        )
        for label in data.labels
    ]
    all_button = tag("button", "show all", type="button", class_="all", data_all=True, hidden=True)
    return tag("div", buttons, all_button, class_="bar", role="toolbar", aria_label="policies: press to hide or show")


def _summary(data: ReportData, flags: Sequence[FlagRow]) -> list[Content]:
    caption = "Means over all videos with 95 % intervals"
    if data.others and data.baseline:
        caption += f"; \u25b2 \u25bc significantly better or worse than {data.baseline} (Holm, 5 %)"
    return [_findings(data, flags), level_table(data, caption=caption, with_costs=True), score_table(data)]


def _findings(data: ReportData, flags: Sequence[FlagRow]) -> Markup:
    items: list[Content] = []
    if data.others and data.baseline:
        tested = [(label, item, item.difference(label)) for label in data.others for item in data.headlines]
        known = [difference for _, _, difference in tested if difference.value is not None]
        count = sum(difference.is_significant for difference in known)
        items.append(
            f"{count} of {len(known)} differences to {data.baseline} are significant in the measures of this table."
        )
        items += [_verdict(data, label) for label in data.others] if len(data.others) <= 6 else []
    counts = Counter(row[0] for row in flags)
    if counts:
        texts = [f"{label} {count}" for label, count in counts.most_common()]
        link = tag("a", "flagged", href="#flags")
        items.append(join("Videos were ", link, f" as frozen, looping, cutting or flickering: {', '.join(texts)}."))
    official = [item.title for item in data.headlines if item.is_comparable]
    if official:
        items.append(f"Only {', '.join(official)} may stand beside published VBench numbers, under the same protocol.")
    else:
        items.append("Nothing in this table may stand beside published VBench numbers: no official network was used.")
    needed = least_prompts(len(data.others))
    if data.others and data.baseline and data.num_prompts < needed:
        few = f"under {needed} prompts no difference can be significant, and these are {data.num_prompts}"
        items.append(f"Too few prompts: {few}.")
    elif data.num_prompts < FEW_PROMPTS:
        items.append(f"{data.num_prompts} prompts are few: read the intervals, not the means.")
    return tag("ul", [tag("li", item) for item in items], class_="findings")


def least_prompts(num_compared: int) -> int:
    """Prompts from which on a sign test can reach 5 % after Holm's correction over so many policies."""
    return next(count for count in range(1, 99) if max(1, num_compared) * 2.0 ** (1 - count) <= LEVEL)


def _verdict(data: ReportData, label: str) -> Markup:
    words: dict[str, list[str]] = {"up": [], "down": [], "sig": []}
    for measure in data.headlines:
        verdict = verdict_of(measure.difference(label), measure.direction)
        if verdict:
            words[verdict].append(measure.title)
    names = {"up": "better in", "down": "worse in", "sig": "different in"}
    parts = [f"{names[key]} {', '.join(titles)}" for key, titles in words.items() if titles]
    text = "; ".join(parts) or f"no difference to {data.baseline} that {data.num_prompts} prompts can show"
    return join(tag("strong", label), f": {text}.")


def _differences(data: ReportData) -> Section | None:
    if not (data.others and data.baseline):
        return None
    note = tag(
        "p",
        f"Policy minus {data.baseline} on the same prompts and seeds, with 95 % intervals over prompts. The shaded "
        "stretch is blind: a true difference inside it would be missed in one comparison of five or more. ",
        "\u25b2 better, \u25bc worse, \u25c6 different: significant after Holm's correction over the policies.",
        class_="note",
    )
    panels = []
    for measure in data.headlines:
        rows = {label: measure.difference(label) for label in data.others}
        drawing = interval_rows(data, rows, reference=0.0, signed=True, direction=measure.direction)
        panels.append(tag("figure", tag("figcaption", measure_title(measure)), drawing, class_="panel"))
    return "differences", "Differences to the baseline", [note, tag("div", panels, class_="panels")]


def _moments(data: ReportData) -> Section | None:
    tables = []
    for moment in data.moments:
        if any(item.level(label, moment).value is not None for item in data.headlines for label in data.labels):
            caption = f"At {moment} s: means over the five seconds that end there"
            summary = tag("summary", tag("strong", f"At {moment} s"))
            tables.append((summary, level_table(data, caption=caption, moment=moment)))
    last = len(tables) - 1
    is_short = len(data.labels) <= MANY_POLICIES
    blocks = [tag("details", table, open=is_short or place == last) for place, table in enumerate(tables)]
    return ("moments", "At moments", blocks) if blocks else None


def _curves(data: ReportData) -> Section | None:
    measures = [measure for measure in data.measures.values() if measure.has_curve]
    if not measures:
        return None
    first = [measure for measure in data.headlines if measure.has_curve]
    ordered = sorted(measures, key=lambda measure: measure not in first)
    drawn, points = [], 0
    for measure in ordered:
        points += sum(len(measure.curve(label)) for label in data.labels)
        if points > MAX_CURVE_POINTS and drawn:
            break
        drawn.append(measure)
    drawn.sort(key=measures.index)
    shown = first[0] if first else drawn[0]
    identities = {measure.name: f"curve{position}" for position, measure in enumerate(drawn)}
    figures = [
        curve_figure(data, measure, identity=identities[measure.name], hidden=measure is not shown)
        for measure in drawn
    ]
    many = len(data.labels) > 5
    bands = tag("input", type="checkbox", id="bands", checked=not many)
    select = tag("select", _options(drawn, shown, identities), id="measure")
    controls = tag(
        "div",
        tag("label", "measure ", select),
        tag("label", bands, " 95 % bands"),
        class_="controls",
    )
    left = len(measures) - len(drawn)
    more = tag("p", f"The curves of {left} further measures are in curves.csv.", class_="quiet") if left else None
    note = tag(
        "p",
        f"Mean over videos per window (most measures: {WINDOW_SECONDS:g} s) with 95 % bands over prompts. "
        "Point at the figure to read values; press a policy above to hide it, with Shift to see it alone.",
        class_="note",
    )
    box = tag("div", figures, class_="curvebox" if many else "curvebox bands")
    return "curves", "Over time", [note, controls, box, more]


def _options(drawn: Sequence[Measure], shown: Measure, identities: dict[str, str]) -> list[Markup]:
    groups: dict[str, list[Markup]] = {}
    for measure in drawn:
        name = measure.name.removeprefix(f"{measure.family}/").replace("_", " ")
        option = tag("option", name, value=identities[measure.name], selected=measure is shown)
        groups.setdefault(measure.family, []).append(option)
    return [tag("optgroup", options, label=f"{family}/") for family, options in groups.items()]


def _scatter(data: ReportData) -> Section | None:
    motion, consistency = data.first(MOTION), data.first(CONSISTENCY)
    if motion is None or consistency is None:
        return None
    note = tag(
        "p",
        "A video that stands still is perfectly consistent. A policy is better than another only if it is higher "
        "without being further left. Large: means with 95 % intervals; small: videos.",
        class_="note",
    )
    return "motion", "Motion against consistency", [note, scatter_figure(data, motion, consistency)]


def _seams(data: ReportData) -> Section | None:
    measure = data.first(SEAMS)
    if measure is None:
        return None
    note = tag(
        "p",
        "Change between frames where two blocks of the rollout meet, divided by the change elsewhere: 1 is no seam.",
        class_="note",
    )
    rows: dict[str, Estimate] = {label: measure.level(label) for label in data.labels}
    drawing = interval_rows(data, rows, reference=1.0, signed=False)
    figure = tag("figure", tag("figcaption", measure_title(measure)), drawing, class_="panel single")
    return "seams", "Seams between blocks", [note, figure]


def _films_note(data: ReportData) -> Markup:
    return tag(
        "p",
        "The first prompts of the list, first seed, not chosen by what they show. "
        "Frames at the start, at each quarter and at the end.",
        class_="note",
    )


def _flags(data: ReportData, flags: Sequence[FlagRow]) -> Content:
    if not flags:
        return tag("p", "No video stands still, repeats itself, cuts or flickers as far as was measured.")
    return flag_table(data, flags)


def _all_measures(data: ReportData) -> list[Content]:
    families: dict[str, list[Measure]] = {}
    for measure in data.measures.values():
        families.setdefault(measure.family, []).append(measure)
    blocks = []
    for family, measures in families.items():
        caption = f"{family}/: {FAMILIES.get(family, '')}"
        summary = tag("summary", tag("code", f"{family}/"), f" {len(measures)} ", tag("span", FAMILIES.get(family)))
        is_open = family not in ("drift", "set") and len(measures) * len(data.labels) <= 200
        blocks.append(tag("details", summary, measure_table(data, measures, caption=caption), open=is_open))
    return blocks


def _method(data: ReportData, file_names: Sequence[str], notes: Sequence[str]) -> list[Content]:
    statistics = [
        "Intervals: 95 %, percentile bootstrap over prompts; the seeds of one prompt are drawn together, since they "
        "are not independent.",
        "Differences: paired by prompt and seed. Significant: sign test over prompts at 5 % after Holm's correction "
        "over the policies of one measure, and an interval without zero. Measures are not corrected for each other.",
        "Smallest difference that could be found: at 80 % power and two-sided 5 %. No mark is no proof of equality.",
        f"Videos: {data.num_videos}; prompts: {data.num_prompts}; seeds of a prompt: {data.num_seeds}.",
        *(f"{family}/: {text}." for family, text in FAMILIES.items()),
    ]
    commands = tag("pre", tag("code", "\n".join(data.commands)), tabindex=0) if data.commands else None
    shown = {key: value for key, value in data.protocol.items() if value not in (None, "", (), [], {})}
    links = [tag("li", tag("a", name.rpartition("/")[2], href=name)) for name in file_names]
    return [
        tag("h3", "The same numbers again") if commands else None,
        commands,
        tag("h3", "Statistics and names"),
        tag("ul", [tag("li", text) for text in statistics]),
        tag("h3", "Protocol ", tag("code", fingerprint(data))) if shown else None,
        mapping_list(shown) if shown else None,
        tag("h3", "Files beside this page"),
        tag("ul", links, class_="files"),
        [tag("p", note, class_="quiet") for note in notes],
    ]
