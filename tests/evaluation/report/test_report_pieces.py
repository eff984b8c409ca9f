"""What reports are made of: escaped markup, axes, labels that keep apart, digits, and colours for every eye."""

import re
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import NASTY

from longtake.evaluation.report.axes import clock, place_names, seconds_axis, spread, value_axis
from longtake.evaluation.report.colours import DARK, DARK_PAGE, LIGHT, LIGHT_PAGE, colour_rules
from longtake.evaluation.report.data import Estimate, Measure, digits_for, interval, number
from longtake.evaluation.report.markup import Markup, breakable, escape, join, tag

SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)


class Texts(HTMLParser):
    """Collects text, and the tags that were really opened."""

    def __init__(self):
        super().__init__()
        self.texts, self.tags = [], []

    def handle_data(self, data):
        self.texts.append(data)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


@SETTINGS
@given(st.text(max_size=40))
def test_text_stays_text_wherever_it_is_put(text):
    parser = Texts()
    parser.feed(tag("td", text, [text, [text]], title=text))
    parser.close()
    assert [name for name, _ in parser.tags] == ["td"]
    shown = "".join(c for c in text.encode("utf-8", "replace").decode() if c >= " " or c in "\n\t")
    shown = re.sub("[\u200e\u200f\u202a-\u202e\u2066-\u2069]", "", shown)
    assert "".join(parser.texts) == shown * 3
    assert parser.tags[0][1]["title"] == shown


def test_markup_is_not_escaped_twice_and_knows_its_elements():
    assert join("a < b", tag("b", 1), None, [2.5]) == "a &lt; b<b>1</b>2.5"
    assert tag("use", href="#m0", data_run=3, hidden=False, open=True) == '<use href="#m0" data-run="3" open/>'
    assert isinstance(escape("x"), Markup)
    assert "<script" not in tag("p", NASTY) and "\u202e" not in tag("p", NASTY) and "\x07" not in tag("p", NASTY)
    with pytest.raises(ValueError, match="<img> can hold nothing"):
        tag("img", "text")


def test_a_long_name_may_break_only_where_its_parts_meet():
    text = breakable("vbench_form/long/x<y[enc=hog+hist]")
    assert unescape(text.replace("<wbr/>", "")) == "vbench_form/long/x<y[enc=hog+hist]"
    assert text == "vbench_<wbr/>form/<wbr/>long/<wbr/>x&lt;y<wbr/>[enc=<wbr/>hog+<wbr/>hist]"


VALUES = st.lists(st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: round(value, 6)), min_size=1, max_size=8)


@SETTINGS
@given(VALUES)
def test_an_axis_holds_all_values_between_round_ticks(values):
    axis = value_axis(values)
    assert axis.low < axis.high and all(axis.low <= value <= axis.high for value in values)
    assert 2 <= len(axis.ticks) <= 13 and list(axis.ticks) == sorted(set(axis.ticks))
    assert len(set(axis.tick_texts)) == len(axis.ticks)
    for tick, text in zip(axis.ticks, axis.tick_texts, strict=True):
        assert float(text.replace("\u2212", "-")) == pytest.approx(tick, rel=1e-9, abs=1e-9)
    shares = [axis.percent(value) for value in sorted(values)]
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 100


def test_an_axis_has_no_room_beyond_what_values_can_be():
    axis = value_axis([0.98, 0.999], bounds=(0.0, 1.0))
    assert axis.high == 1.0
    assert value_axis([0.0, 3.0], bounds=(0.0, None)).low == 0.0
    assert value_axis([3.0, 4.0], include=(0.0,)).low < 0.0
    # Values beyond their bound, which only a mistake makes, are still shown.
    assert value_axis([1.2, 0.9], bounds=(0.0, 1.0)).high > 1.2
    assert value_axis([1.0, 1.0], bounds=(0.0, 1.0)).low < 1.0
    with pytest.raises(ValueError, match="at least one value"):
        value_axis([])


@pytest.mark.parametrize(("end", "step"), [(5, 1), (60, 10), (120, 20), (600, 120), (3600, 600)])
def test_time_is_ticked_at_moments_people_name(end, step):
    ticks = seconds_axis(end).ticks
    assert ticks[:3] == (0, step, 2 * step) and ticks[-1] <= end
    assert clock(90, end=120) == "90" and clock(90, end=600) == "1:30"


POSITIONS = st.lists(st.floats(-50.0, 450.0, allow_nan=False), max_size=16)


@SETTINGS
@given(POSITIONS)
def test_labels_keep_apart_in_order_and_inside(positions):
    placed = spread(positions, gap=16.0, low=4.0, high=376.0)
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    steps = np.diff([placed[index] for index in order])
    assert (steps >= 16.0 - 1e-6).all()
    assert all(4.0 - 1e-6 <= place <= 376.0 + 1e-6 for place in placed)


def test_labels_that_have_room_stay_where_they_are_and_a_crowd_shares_the_room():
    assert spread([300.0, 100.0, 200.0], gap=16.0, low=0.0, high=380.0) == [300.0, 100.0, 200.0]
    assert spread([50.0, 50.0], gap=20.0, low=0.0, high=100.0) == [40.0, 60.0]
    crowd = spread([10.0] * 5, gap=30.0, low=0.0, high=100.0)
    assert crowd == pytest.approx([0.0, 25.0, 50.0, 75.0, 100.0])


def test_names_of_a_scatter_avoid_each_other():
    points = [(100.0, 100.0), (104.0, 103.0), (100.0, 110.0), (980.0, 50.0)]
    spots = place_names(points, [60.0] * 4, height=16.0, room=(0.0, 0.0, 1000.0, 380.0))
    boxes = [(x - 60 if ends else x, y - 8, x if ends else x + 60, y + 8) for x, y, ends in spots]
    for i, a in enumerate(boxes):
        assert a[0] >= 0 and a[2] <= 1000
        for b in boxes[:i]:
            assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])
    assert spots[3][2], "a name at the right edge stands left of its point"


@pytest.mark.parametrize(
    ("widths", "digits"),
    [((0.02, 0.03), 3), ((2.0, 3.0), 1), ((20.0, 40.0), 0), ((0.0004, 0.0004), 5), ((1e-9, 1e-9), 5)],
)
def test_digits_follow_the_intervals(widths, digits):
    column = [Estimate(value=0.5, low=0.5 - width / 2, high=0.5 + width / 2) for width in widths]
    assert digits_for(column) == digits


def test_numbers_read_well():
    assert number(-0.0123, 2) == "\u22120.01" and number(0.02, 2, signed=True) == "+0.02"
    assert number(-0.0001, 2) == "0.00", "no negative zero"
    assert number(12345.6, 0) == "12\u202f346" and number(None, 2) == ""
    assert interval(Estimate(value=1.0, low=0.9, high=1.1), 1) == "0.9\u20131.1"
    assert interval(Estimate(value=0.0, low=-0.1, high=0.1), 1) == "\u22120.1 to 0.1"
    assert interval(Estimate(value=0.0), 1) == ""


@pytest.mark.parametrize(
    "cell", [None, {}, {"mean": None}, {"mean": float("nan")}, {"skipped": "why"}, {"mean": True}]
)
def test_what_is_not_a_number_is_not_measured(cell):
    estimate = Estimate.read(cell)
    assert estimate.value is None and estimate.reason


@pytest.mark.parametrize(
    ("name", "title", "place", "backbone"),
    [
        ("vbench_form/long/subject_consistency[enc=hog]", "Subject consistency", "vbench_form/long/", "enc=hog"),
        ("judge/background_psnr", "Background PSNR", "judge/", ""),
        ("drift/judge/background_psnr/delta5", "Background PSNR, delta5", "drift/judge/background_psnr/", ""),
        ("set/prdc_precision[enc=a][ref=b]", "Prdc precision", "set/", "enc=a, ref=b"),
    ],
)
def test_titles_say_what_names_say(name, title, place, backbone):
    measure = Measure(name=name, entry={})
    assert (measure.title, measure.place, measure.backbone) == (title, place, backbone)


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
VISIONS = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def linear(colour):
    values = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def oklab(rgb):
    first = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    second = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.cbrt(np.clip(rgb, 0, 1) @ np.transpose(first)) @ np.transpose(second)


def least_distance(colours, vision):
    seen = oklab(np.array([linear(colour) for colour in colours]) @ np.transpose(VISIONS[vision]))
    distances = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
    return distances[np.triu_indices(len(colours), 1)].min()


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_stay_apart_for_every_eye(colours, vision):
    assert least_distance(colours, vision) >= 0.09
    # What many plots are drawn with does not: its red and green, or its greys, run together.
    tableau = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22"]
    if vision != "normal":
        assert least_distance(tableau, vision) < 0.09


@pytest.mark.parametrize(("colours", "page"), [(LIGHT, LIGHT_PAGE), (DARK, DARK_PAGE)], ids=["light", "dark"])
def test_colours_are_seen_against_the_page(colours, page):
    weights = np.array([0.2126, 0.7152, 0.0722])
    ground = weights @ linear(page)
    for colour in colours:
        shade = weights @ linear(colour)
        assert (max(shade, ground) + 0.05) / (min(shade, ground) + 0.05) >= 3.0, colour


def test_every_colour_has_a_rule_in_both_schemes():
    rules = colour_rules()
    assert all(colour in rules for colour in (*LIGHT, *DARK, LIGHT_PAGE, DARK_PAGE))
    assert rules.index(DARK[1]) > rules.index("prefers-color-scheme:dark") > rules.index(LIGHT[1])
