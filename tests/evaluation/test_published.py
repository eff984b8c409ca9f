"""VBench's totals and published numbers: the formula gives the printed ones, no number stands without its members."""

import json

import pytest

from longtake.evaluation.published import COLUMNS, TAGS, find_rows, load_published
from longtake.evaluation.scores import QUALITY, SEMANTIC, TOTALS, member_name

quality7, quality6_long, semantic, total = (
    TOTALS[name] for name in ("quality7", "quality6_long", "semantic", "total")
)
ALL = {f"vbench/{name}": 0.5 for name in (*QUALITY, *SEMANTIC)}


@pytest.fixture(scope="module")
def rows():
    return load_published()


def _values(row, folder=""):
    return {f"vbench/{folder}{name}": number.value / 100 for name, number in row.numbers.items() if name in QUALITY}


def test_the_formula_gives_the_printed_quality_of_a_whole_table(rows):
    table = [row for row in rows if row.table == "recency_forcing_60s"]
    assert len(table) == 8
    for row in table:
        value, reason = quality7(_values(row))
        assert reason is None
        # The inputs are printed to 0.01; 6.5 of them add up.
        assert 100 * value == pytest.approx(row.numbers["quality7"].value, abs=0.01), row.model
    # Without flickering the same rows are about two points lower.
    expected = [80.35, 80.42, 80.95, 77.59, 77.50, 79.37, 79.88, 82.92]
    assert [100 * quality6_long(_values(row, "long/"))[0] for row in table] == pytest.approx(expected, abs=0.01)
    derived = [row for row in rows if "quality6_long" in row.numbers]
    assert len(derived) == 10
    for row in derived:
        number = row.numbers["quality6_long"]
        assert number.tag == "D"
        assert 100 * quality6_long(_values(row, "long/"))[0] == pytest.approx(number.value, abs=0.01)


@pytest.mark.parametrize(("score", "num_members"), [(quality7, 7), (semantic, 9), (total, 16)])
def test_a_missing_member_means_no_score(score, num_members):
    assert score(ALL)[0] is not None
    members = [name for name in ALL if score({**ALL, name: None})[0] is None]
    assert len(members) == num_members
    for name in members:
        without = {key: value for key, value in ALL.items() if key != name}
        assert score(without) == (None, f"missing: {name}")
    _, reason = score({"vbench/imaging_quality": 0.7})
    assert reason.count("vbench/") == num_members - (score is not semantic), "all are named"


def test_members_are_official_ones_of_their_variant_and_zero_is_a_value():
    values = {**ALL, "vbench_form/subject_consistency[enc=hog+hist]": 0.9}
    del values["vbench/subject_consistency"]
    assert quality7(values) == (None, "missing: vbench/subject_consistency")
    assert quality7({**ALL, "vbench/dynamic_degree": 0.0})[1] is None
    with pytest.raises(ValueError, match="imaging_quality=69.3 .* scale 0.01"):
        quality7({**ALL, "vbench/imaging_quality": 69.3})
    # VBench-Long's development flag changes the two consistencies only.
    assert member_name("subject_consistency", "long_dev") == "vbench/long_dev/subject_consistency"
    assert member_name("imaging_quality", "long_dev") == "vbench/long/imaging_quality"
    values = {member_name(name, "long_dev"): 0.9 for name in QUALITY}
    assert TOTALS["quality6_long_dev"](values)[0] is not None
    assert quality6_long(values)[0] is None
    del values["vbench/long/temporal_flickering"]
    assert TOTALS["quality7_long_dev"](values) == (None, "missing: vbench/long/temporal_flickering")


def test_every_row_says_where_it_is_from(rows):
    assert len(rows) > 80
    for row in rows:
        assert row.source and row.protocol and row.numbers
        assert {number.tag for number in row.numbers.values()} <= TAGS.keys()
        assert row.numbers.keys() <= COLUMNS.keys()
        for name, number in row.numbers.items():
            least = 60 if name in ("motion_smoothness", "temporal_flickering", "quality7", "total") else 0
            assert least <= number.value <= 100, (row.table, row.model, name, "percent throughout")
    assert len({(row.table, row.model) for row in rows}) == len(rows)
    json.dumps([row.to_json() for row in rows], allow_nan=False)
    assert {row.seconds for row in find_rows(rows, seconds=60)} == {60.0}
    assert find_rows(rows, seconds=1.0) == []


GOOD = """
schema: 1
tables:
- {id: t, source: here, protocol: p, seconds: 5, tag: V, columns: [total, scene], rows: {A: [1.0, null]}}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("schema: 1", "schema: 2", "must hold 'schema: 1'"),
        ("columns: [total, scene]", "columns: [total, scenes]", "Did you mean 'scene'"),
        ("tag: V", "tag: Q", "unknown tag 'Q'"),
        ("seconds: 5", "seconds: -5", "seconds=-5"),
        ("{A: [1.0, null]}", "{A: [1.0]}", "needs 2 values"),
        ("{A: [1.0, null]}", "{A: [.nan, null]}", "is no number"),
        ("{A: [1.0, null]}", "{A: [yes, null]}", "is no number"),
        ("{A: [1.0, null]}", "{A: {values: [1.0, null], why: x}}", "at most a tag and a note"),
        ("{A: [1.0, null]}", "[]", "rows must map"),
        ("source: here, ", "", r"missing \['source'\]"),
        ("id: t, ", "", "needs an id"),
        ("tables:", "tables: [", "cannot read"),
        ("tables:", f"tables:{GOOD.split('tables:')[1]}", "'A' stands twice"),
    ],
)
def test_a_file_of_ones_own_is_read_and_what_is_wrong_in_it_is_named(tmp_path, old, new, message):
    path = tmp_path / "own.yaml"
    path.write_text(GOOD)
    (row,) = load_published(path)
    assert {name: number.value for name, number in row.numbers.items()} == {"total": 1.0}
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_published(path)
