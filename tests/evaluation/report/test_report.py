"""Reports: every number is the comparison's, nothing is invented where something is missing, and text stays text."""

import csv
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image
from report_runs import FROZEN, NASTY, POLICIES, SKIPPED, WITHOUT_OVERALL, build_runs, compare, write_videos
from rich.console import Console

from longtake.evaluation.intervals import _sign_test
from longtake.evaluation.published import find_rows, load_published
from longtake.evaluation.report import _least_prompts, figures, render_page, write_report
from longtake.evaluation.report.data import DARK, LIGHT, Measure, ReportData
from longtake.evaluation.report.figures import (
    _find_video,
    _shared_prompts,
    _strip_indices,
    curve_points,
    draw_curve,
    draw_differences,
    plot_svg,
)
from longtake.evaluation.report.tables import summary_table

VOID = {"br", "col", "hr", "img", "input", "link", "meta", "wbr"}

COMMANDS = ["longtake evaluate run --cache full,pack --out 'my <out>'", "longtake evaluate report OUT"]
PROTOCOL = {"name": "standard", "fingerprint": "feedfacecafe0001", "caches": {"pack": {"policy": "pack"}}, "crf": 12}


class Page(HTMLParser):
    """A page's elements as (tag, attributes, path of ids), its tables as rows of cells, and faults of nesting."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.faults, self.elements, self.tables, self.texts = [], [], [], [], []
        self.feed(text)
        self.close()
        self.faults += self.open
        self.text = "".join(self.texts)
        self.sections = {attrs["id"] for attrs in self.all("section")}

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append([dict(attrs), ""])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data):
        self.texts.append(data)
        if self.tables and ("td" in self.open or "th" in self.open):
            self.tables[-1][-1][-1][1] += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def runs():
    return build_runs(4, prompt=NASTY)


@pytest.fixture(scope="module")
def comparison(runs):
    return compare(runs)


@pytest.fixture(scope="module")
def out(runs, comparison, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    videos = write_videos(folder, runs, num_prompts=1)
    rows = find_rows(load_published(), seconds=60)
    about = {"commands": COMMANDS, "protocol": PROTOCOL, "videos": videos, "published": rows}
    write_report(folder, ReportData(runs=runs, comparison=comparison, **about))
    return folder


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes the page of some runs, without plots, which take most of the time."""
    monkeypatch.setattr(figures, "write_figures", lambda data, folder: [])
    monkeypatch.setattr(figures, "plot_svg", lambda *args, **options: Markup("<svg></svg>"))

    def make(runs, comparison=None, **options):
        path = write_report(tmp_path, ReportData(runs=runs, comparison=comparison or compare(runs), **options))
        return Page(path.read_text(encoding="utf-8"))

    return make


@pytest.fixture(scope="module")
def text(out):
    return (out / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


@pytest.fixture(scope="module")
def data(runs, comparison):
    return ReportData(runs=runs, comparison=comparison)


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_page_is_well_formed_and_complete(page):
    assert not page.faults
    identities = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(identities) == len(set(identities))
    hrefs = [attrs.get("href") or attrs["xlink:href"] for attrs in page.all("a") + page.all("use")]
    links = {href[1:] for href in hrefs if href.startswith("#")}
    assert links <= set(identities)
    wanted = "summary differences moments curves motion seams films costs flags all missing published method"
    assert set(wanted.split()) == page.sections


def test_the_page_needs_nothing_but_itself(page, text):
    assert not page.all("link") and not page.all("iframe")
    sources = [attrs[key] for _, attrs in page.elements for key in ("src", "data", "srcset") if key in attrs]
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"url\(|@import|https?://", text)
    policy = next(attrs["content"] for attrs in page.all("meta") if attrs.get("http-equiv"))
    rules = text.partition("prefers-color-scheme")
    assert all(colour in rules[0] for colour in LIGHT) and all(colour in rules[2] for colour in DARK)
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy


def test_files_beside_the_page_are_all_there(page, out):
    names = [attrs["href"] for attrs in page.all("a") if not attrs["href"].startswith("#")]
    assert {"report/summary.csv", "report/curves.png", "comparison.json"} <= set(names)
    assert all((out / name).stat().st_size for name in names)
    pictures = [name for name in names if name.endswith(".png")]
    assert pictures == [f"report/{name}.png" for name in ("curves", "differences", "motion", "seams")]
    for name in pictures:
        with Image.open(out / name) as image:
            assert image.width > 400 and np.asarray(image.convert("L")).std() > 5


def test_text_from_files_stays_text(page, text):
    scripts = page.all("script")
    assert len(scripts) == 1 and not re.search("<script>document", text)
    assert "a <script>document.title='owned'</script> & \"quoted\" red circle" in page.text
    assert "'my <out>'" in page.text and "\u202e" not in text


def test_labels_and_reasons_are_escaped_everywhere(made):
    evil = "<img src=x onerror=alert(1)>"
    runs = [replace(run, label=f"{evil}{n}", skipped={f"vbench/{evil}": evil}) for n, run in enumerate(build_runs(2))]
    page = made(runs, commands=[evil], protocol={evil: {evil: [evil]}})
    assert not page.all("img") and not page.faults
    assert not [attrs for _, attrs in page.elements if any(key.startswith("on") for key in attrs)]


def test_no_nan_reaches_anything(out, text):
    shown = re.sub(r"(?s)<script>.*?</script>|<style>.*?</style>|<meta .*?>", "", text)
    assert not re.search(r"(nan|NaN|inf|Infinity|None|undefined|null)", shown)
    for path in (out / "report").glob("*.csv"):
        cells = {cell.lower() for row in csv.reader(path.open(encoding="utf-8")) for cell in row}
        assert not cells & {"nan", "inf", "-inf", "none"}, path.name
    json.loads((out / "comparison.json").read_text(), parse_constant=pytest.fail)


def test_the_first_table_holds_the_comparisons_means(page, data):
    body = page.tables[0][1:]
    assert [row[0][0]["data-v"] for row in body[:4]] == list(POLICIES[:4])
    for row in body[:4]:
        label = row[0][0]["data-v"]
        for (attrs, shown), measure in zip(row[1:], data.headlines, strict=False):
            level = measure.level(label)
            if level.value is None:
                assert shown == "not measured" and "data-v" not in attrs
                continue
            assert float(attrs["data-v"]) == pytest.approx(level.value, rel=1e-5)
            tolerance = 0.06 * (level.high - level.low)
            assert float(re.match(r"[\d.]+", shown)[0]) == pytest.approx(level.value, abs=tolerance)
            better = {"up": 1, "down": -1}.get(attrs.get("class"), 0)
            difference = measure.difference(label)
            assert bool(attrs.get("class")) == difference.is_significant
            assert better in (0, measure.direction * math.copysign(1, difference.value or 0.0))
    assert body[4][0][1] == "smallest difference that could be found"


def test_marks_follow_the_direction_of_the_measure(made):
    """Lower is better for the seam ratio: the same difference is an improvement there and a loss elsewhere."""
    runs = build_runs(4)
    names = ["proxy/chunk_seam_ratio", "judge/mean_of_six"]
    comparison = compare(runs)
    seen = set()
    for row in made(runs, comparison, headline=names).tables[0][2:5]:
        for (attrs, _), name, sign in zip(row[1:], names, (-1, 1), strict=False):
            cell = comparison["metrics"][name]["paired"][row[0][0]["data-v"]]
            expected = {1: "up", -1: "down"}[sign * np.sign(cell["difference"])] if cell["significant"] else None
            assert attrs.get("class") == expected
            seen.add((sign, expected))
    assert {(-1, "up"), (-1, "down"), (1, "up")} <= seen


def test_what_is_missing_is_told_with_its_reason(page, data):
    table = next(table for table in page.tables if table[0][0][1] == "measure" and table[0][1][1] == "why")
    told = {(name, row[1][1], row[2][1]) for row in table[1:] for name in re.split(r"(?=vbench/)", row[0][1]) if name}
    assert told == {(name, why, "every policy") for name, why in SKIPPED.items()} | {
        ("vbench/overall_consistency", "the text encoder gave no finite number", WITHOUT_OVERALL)
    }
    assert "vbench/imaging_quality" not in data.measures


def drawn(data, draw, measure):
    """Artists that a panel draws, by policy and kind: {(label, kind): artist}."""
    axes = Figure().subplots()
    order = draw(axes, data, measure)
    ids = ((artist, (artist.get_gid() or "").split("-")) for artist in axes.get_children())
    return order, {(data.labels[int(words[1])], words[2]): artist for artist, words in ids if len(words) == 3}


def test_curves_and_bands_are_drawn_where_their_values_are(data):
    measure = data.measures["judge/mean_of_six"]
    order, artists = drawn(data, draw_curve, measure)
    for label in data.labels:
        points = measure.curve(label)
        middles = [(point["start_s"] + point["end_s"]) / 2 for point in points]
        means = [point["mean"] for point in points]
        line = artists[label, "line"]
        assert np.allclose(line.get_xydata(), np.transpose([middles, means]))
        assert line.get_color() == LIGHT[data.labels.index(label)]
        corners = artists[label, "band"].get_paths()[0].vertices
        wanted = {(time, point[end]) for time, point in zip(middles, points, strict=True) for end in ("low", "high")}
        assert {(round(x, 6), round(y, 6)) for x, y in corners} == {(round(x, 6), round(y, 6)) for x, y in wanted}
    assert order == sorted(data.labels, key=lambda label: -measure.curve(label)[-1]["mean"]), "the legend's order"


def test_windows_without_a_value_leave_a_gap(data):
    """The last two windows of motion smoothness have none: nothing is drawn there, least of all a zero."""
    measure = next(measure for name, measure in data.measures.items() if "motion_smoothness" in name)
    _, artists = drawn(data, draw_curve, measure)
    values = artists["full", "line"].get_ydata()
    assert np.isnan(values[-2:]).all() and not np.isnan(values[:-2]).any()
    assert artists["full", "mark"].get_xdata() == [55.0], "the marker stands at the last value"


def test_differences_are_drawn_with_their_intervals_and_only_significant_ones_are_filled(data):
    seen = set()
    for measure in data.headlines:
        _, artists = drawn(data, draw_differences, measure)
        for label in data.others:
            difference = measure.difference(label)
            if difference.value is None:
                assert artists[label, "value"].get_text() == "not measured " and (label, "mark") not in artists
                continue
            mark = artists[label, "mark"]
            assert mark.get_xdata() == [difference.value]
            assert list(artists[label, "whisker"].get_xdata()) == [difference.low, difference.high]
            assert (mark.get_markerfacecolor() != "#ffffff") == difference.is_significant
            _, _, sign = artists[label, "value"].get_text().partition(" ")
            assert bool(sign) == difference.is_significant
            seen.add(difference.is_significant)
    assert seen == {True, False}


def test_a_plot_of_the_page_uses_its_colours_its_own_ids_and_plain_text(data):
    evil = "_<b>$x_1$</b>\u202e"
    runs = [replace(run, label=f"{evil}{n}") for n, run in enumerate(data.runs[:2])]
    strange = ReportData(runs=runs, comparison=compare(runs))
    svg = plot_svg(strange, strange.measures["judge/mean_of_six"], draw_curve, identity="c7")
    assert svg.count("_&lt;b&gt;$x_1$&lt;/b&gt;") == 2 and "\u202e" not in svg
    assert set(re.findall(r'id="(c7)-', svg)) == {"c7"} and not re.findall(r'id="(?!c7-)', svg)
    assert "var(--h0)" in svg and "var(--h1)" in svg and not [colour for colour in LIGHT if colour in svg]
    for kind in ("line", "band", "mark", "key", "end"):
        assert svg.count(f'data-run="1" class="{kind}"') == 1, kind


def test_a_window_that_repeats_the_one_before_is_not_drawn():
    """VBench-Long's last clip borrows frames of the one before it; its value stays in the tables."""
    points = [{"start_s": start, "end_s": start + 2.0, "mean": 0.5, "low": 0.4, "high": 0.6} for start in (0, 2, 2.06)]
    measure = Measure("vbench/long/x", {"curves": {"full": points}})
    assert [time for time, _ in curve_points(measure, ["full"])["full"]] == [1.0, 3.0]


@pytest.mark.parametrize(("num_compared", "needed"), [(1, 6), (3, 7), (15, 10)])
def test_so_few_prompts_cannot_show_a_difference(num_compared, needed):
    """Even if every prompt agrees: the smallest p of the sign test, times Holm's factor, is above 5 %."""
    assert _least_prompts(num_compared) == needed
    assert num_compared * _sign_test(needed, 0) <= 0.05 < num_compared * _sign_test(needed - 1, 0)


def test_drift_that_was_not_measured_stands_apart(made):
    runs = build_runs(2, num_prompts=3, num_windows=4)
    reasons = {"drift/proxy/contrast/delta5": "needs 10 s", "drift/proxy/contrast/abs": "needs 10 s"}
    runs = [replace(run, skipped={**SKIPPED, **reasons}) for run in runs]
    page = made(runs)
    first, second = (table for table in page.tables if table[0][0][1] == "measure" and table[0][1][1] == "why")
    assert all(not row[0][1].startswith("drift/") for row in first[1:])
    cells = ["drift/proxy/contrast/absdrift/proxy/contrast/delta5", "needs 10 s", "every policy"]
    assert [[cell[1] for cell in row] for row in second[1:]] == [cells]
    assert "Too few prompts: under 6 prompts no difference can be significant, and these are 3." in page.text


def test_csv_files_hold_what_the_comparison_does(out, comparison, runs):
    summary = {(row["metric"], row["policy"]): row for row in rows_of(out / "report" / "summary.csv")}
    moments = {(row["metric"], row["policy"], row["moment_s"]): row for row in rows_of(out / "report" / "moments.csv")}
    for name, entry in comparison["metrics"].items():
        for label, cell in entry["runs"].items():
            row = summary[name, label]
            assert (row["mean"] == "") == ("skipped" in cell) == (row["not_measured_because"] != "")
            if "mean" in cell:
                assert float(row["low"]) == pytest.approx(cell["low"], rel=1e-9)
            at = entry["at"]["30"]["runs"][label]
            assert moments[name, label, "30"]["mean"] == (f"{at['mean']:.10g}" if "mean" in at else "")
        for label, cell in entry["paired"].items():
            if "difference" in cell:
                assert float(summary[name, label]["baseline_holm_p"]) == pytest.approx(cell["holm_p"], abs=1e-9)
    videos = rows_of(out / "report" / "videos.csv")
    assert len(videos) == sum(len(video.scores) for run in runs for video in run.videos)
    curves = rows_of(out / "report" / "curves.csv")
    points = [point for entry in comparison["metrics"].values() for own in entry["curves"].values() for point in own]
    assert len(curves) == len(points)


def test_no_cell_is_a_spreadsheets_formula(tmp_path, made):
    made([replace(run, label=f"=cmd|{n}") for n, run in enumerate(build_runs(2, num_prompts=2, num_windows=3))])
    assert {row["policy"] for row in rows_of(tmp_path / "report" / "summary.csv")} == {"'=cmd|0", "'=cmd|1"}


def test_frozen_videos_are_flagged(tmp_path, made):
    runs = [run for run in build_runs(14, num_prompts=4, num_windows=6) if run.label in ("full", FROZEN)]
    assert "nothing moves in the whole video" in made(runs).text
    rows = rows_of(tmp_path / "report" / "flags.csv")
    assert {row["policy"] for row in rows} == {FROZEN} and len(rows) == 4


def test_composite_scores_are_shown_where_there_are_any(made):
    runs = build_runs(2, num_prompts=2, num_windows=3)
    scores = {"full": {"total": {"value": 0.8123}}, POLICIES[1]: {"total": {"value": None, "reason": "no musiq"}}}
    page = made(runs, {**compare(runs), "scores": scores})
    assert [[cell[1] for cell in row[1:]] for row in page.tables[1]] == [["Total"], ["0.8123"], ["not measured"]]
    assert ("span", {"title": "no musiq"}) in page.elements


def test_only_official_numbers_stand_beside_published_ones(page):
    table = next(table for table in page.tables if table[0][0][1] == "model")
    heads = [cell[1] for cell in table[0]]
    own = {row[0][0]["data-v"]: dict(zip(heads[1:], (cell[1] for cell in row[1:]), strict=True)) for row in table[1:5]}
    assert own["full"]["temporal flickering"] != "\u2013" and own["full"]["overall consistency"] != "\u2013"
    assert own[WITHOUT_OVERALL]["overall consistency"] == "\u2013"
    assert all(values["subject consistency"] == "\u2013" for values in own.values()), "vbench_form may not stand here"
    assert any(cell[1].endswith("S+") for row in table[5:] for cell in row)


def test_commands_protocol_and_reasons_for_no_score_are_told(page):
    text = page.text
    assert all(command in text for command in COMMANDS)
    assert "feedfacecafe0001" in text and "caches.pack.policy" in text
    assert "No composite VBench score" in text and "Videos: 96; prompts: 12; seeds of a prompt: 2." in text


def test_a_strip_shows_start_quarters_and_end(page, data):
    assert _strip_indices(41) == [0, 10, 20, 30, 40] and _strip_indices(1) == [0] * 5 and _strip_indices(2)[-1] == 1
    images = [attrs for attrs in page.all("img")]
    assert len(images) == 4, "one prompt has videos, the others are not shown as if they had"
    assert all("frames at 0%, 25%, 50%, 75%, 100%" in image["alt"] for image in images)
    assert {image["width"] for image in images} == {str(5 * 128 + 4 * 3)}, "64 pixels, twice as large"
    assert _shared_prompts(data, count=2) == [0, 1]
    fewer = [replace(run, videos=run.videos[2 if n else 0 :]) for n, run in enumerate(data.runs)]
    assert _shared_prompts(replace(data, runs=fewer), count=2) == [1, 2], "the first prompts that most runs have"


def test_videos_that_are_gone_are_told(tmp_path, made):
    runs = build_runs(2, num_prompts=2, num_seeds=1, num_windows=3)
    folders = write_videos(tmp_path, runs, num_prompts=1)
    (tmp_path / POLICIES[1] / "videos" / "p0000-0.mp4").write_bytes(b"not a video")
    page = made(runs, videos=folders)
    assert len(page.all("img")) == 1 and "not shown: " in page.text
    assert page.text.count("p0001-0.mp4 is not there any more") == 2
    assert "films" not in made(runs, videos={"other": tmp_path}).sections
    line = runs[0].videos[0].video
    assert _find_video(tmp_path / POLICIES[0], line) == _find_video(tmp_path / POLICIES[0] / "videos", line).resolve()


def test_one_run_without_a_baseline_to_compare_with(made):
    page = made(build_runs(1, num_prompts=3, num_seeds=1))
    assert "differences" not in page.sections and {"summary", "curves", "motion"} <= page.sections
    assert not [attrs for attrs in page.all("button") if "data-toggle" in attrs]
    assert "3 prompts are few" in page.text and "baseline" not in page.tables[0][1][0][1]


@pytest.mark.parametrize("overall", [True, False])
def test_a_run_of_one_prompt_and_one_window_has_neither_intervals_nor_curves(tmp_path, overall):
    runs = build_runs(2, num_prompts=1, num_seeds=1, num_windows=1, overall=overall)
    page = Page(write_report(tmp_path, ReportData(runs=runs, comparison=compare(runs))).read_text(encoding="utf-8"))
    assert not page.faults and "curves" not in page.sections
    assert "\u2013" in page.tables[0][-1][1][1], "what could be found is not known from one prompt"
    runs = [replace(run, videos=()) for run in runs]
    page = Page(write_report(tmp_path, ReportData(runs=runs, comparison=compare(runs))).read_text(encoding="utf-8"))
    assert not page.faults and "no video of this run was measured" in page.text


def test_the_same_numbers_give_the_same_bytes(tmp_path, runs, comparison):
    few = ["judge/mean_of_six"]
    data = ReportData(runs=runs, comparison=comparison, headline=few)
    first, second = (write_report(tmp_path / name, data) for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    for path in (tmp_path / "a" / "report").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "report" / path.name).read_bytes(), path.name


def test_a_hundred_measures_of_sixteen_policies_would_stay_under_five_megabytes():
    runs = build_runs(16, num_prompts=2, num_seeds=1, num_windows=30, num_extra=18)
    comparison = compare(runs, num_resamples=20)
    page = render_page(ReportData(runs=runs, comparison=comparison), file_names=[])
    assert len(page) < 400_000 + 45_000 * len(comparison["metrics"])
    assert page.count('class="plot curves"') == len(comparison["metrics"]) - 2, "two have no windows"


def test_a_headline_that_was_not_measured_is_refused(tmp_path, runs, comparison):
    message = "'vbench/imaging_quality' has no value in this comparison; measured: vbench/"
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path, ReportData(runs=runs, comparison=comparison, headline=["vbench/imaging_quality"]))
    assert not list(tmp_path.rglob("*.html"))


def printed(table, width=80):
    console = Console(width=width, record=True, force_terminal=False, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_the_terminals_table_fits_eighty_columns(runs, data):
    text = printed(summary_table(compare(runs[:3])))
    assert all(label in text for label in POLICIES[:3]) and "\u25b2" in text and "\u2026" not in text
    level = data.headlines[0].level("full")
    assert f"{level.value:.4f}" in text and f"{level.low:.4f}\u2013{level.high:.4f}" in text
    text = printed(summary_table(data.comparison))
    assert all(label in text for label in POLICIES[:4]) and "\u2026" not in text and " - " in text


def test_density_stands_among_the_main_costs_only_of_an_evaluation_with_sparse_runs(tmp_path, made):
    runs = build_runs(3, num_prompts=2, num_windows=4)
    assert "attention_density" not in ReportData(runs=runs, comparison={}).costs
    sparse = [replace(run, costs={**run.costs, "attention_density": 0.5}) for run in runs[:2]]
    cells = [cell[1] for row in made([*sparse, runs[2]], compare(runs)).tables[0] for cell in row]
    assert cells.count("attention densitycost") == 1 and cells.count("0.50") == 2
    rows = [row for row in rows_of(tmp_path / "report" / "costs.csv") if row["cost"] == "attention_density"]
    assert {row["policy"]: row["value"] for row in rows} == {run.label: "0.5" for run in sparse}
