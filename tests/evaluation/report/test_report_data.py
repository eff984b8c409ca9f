"""Digits, titles, invisible characters, and colours for every kind of colour vision."""

import numpy as np
import pytest
from report_runs import NASTY

from longtake.evaluation.report import _breakable
from longtake.evaluation.report.data import (
    DARK,
    DARK_PAGE,
    LIGHT,
    LIGHT_PAGE,
    Estimate,
    Measure,
    ReportData,
    digits_for,
    interval,
    number,
    plain_text,
)


def test_invisible_characters_and_lone_surrogates_are_left_out():
    assert plain_text(NASTY) == "a <script>document.title='owned'</script> & \"quoted\" red circle  =1+1"
    assert plain_text("a\ud800\tb\n\x1b") == "a?\tb\n"


def test_a_long_name_may_break_only_where_its_parts_meet():
    text = _breakable("vbench_form/long/x<y[enc=hog+hist]")
    assert text == "vbench_<wbr>form/<wbr>long/<wbr>x&lt;y<wbr>[enc=<wbr>hog+<wbr>hist]"


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
    measure = Measure(name, {})
    assert (measure.title, measure.place, measure.backbone) == (title, place, backbone)


def test_clips_are_preferred_to_whole_videos_and_official_numbers_to_both():
    names = ["vbench_form/dynamic_degree[flow=a]", "vbench_form/long/dynamic_degree[flow=a]", "vbench/dynamic_degree"]
    for count in (1, 2, 3):
        entries = {name: {"runs": {"full": {"mean": 0.5}}} for name in names[:count]}
        data = ReportData(runs=(), comparison={"labels": ["full"], "metrics": entries})
        assert [measure.name for measure in data.headlines] == names[count - 1 : count]


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
