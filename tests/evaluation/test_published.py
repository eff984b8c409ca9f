"""The published numbers: the formula reproduces the ones that can be, and no number stands without its provenance."""

import json

import pytest

from longtake.evaluation.published import COLUMNS, TAGS, find_rows, load_published
from longtake.evaluation.scores import QUALITY, quality6_long, quality7


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


def test_without_flickering_the_same_rows_are_about_two_points_lower(rows):
    expected = [80.35, 80.42, 80.95, 77.59, 77.50, 79.37, 79.88, 82.92]
    table = [row for row in rows if row.table == "recency_forcing_60s"]
    assert [100 * quality6_long(_values(row, "long/"))[0] for row in table] == pytest.approx(expected, abs=0.01)


def test_derived_numbers_are_what_they_are_derived_from(rows):
    derived = [row for row in rows if "quality6_long" in row.numbers]
    assert len(derived) == 10
    for row in derived:
        assert row.numbers["quality6_long"].tag == "D"
        assert 100 * quality6_long(_values(row, "long/"))[0] == pytest.approx(
            row.numbers["quality6_long"].value, abs=0.01
        )


def test_every_row_says_where_it_is_from(rows):
    assert len(rows) > 80
    for row in rows:
        assert row.source and row.protocol and row.numbers
        assert {number.tag for number in row.numbers.values()} <= TAGS.keys()
        assert row.numbers.keys() <= COLUMNS.keys()
    assert len({(row.table, row.model) for row in rows}) == len(rows)
    json.dumps([row.to_json() for row in rows], allow_nan=False)


def test_values_are_percent_throughout(rows):
    for row in rows:
        for name, number in row.numbers.items():
            assert 0 <= number.value <= 100
            if name in ("motion_smoothness", "temporal_flickering", "quality7", "total"):
                assert number.value > 60, (row.table, row.model, name)


def test_rows_of_about_ones_own_length(rows):
    assert {row.seconds for row in find_rows(rows, seconds=60)} == {60.0}
    assert find_rows(rows, seconds=1.0) == []


GOOD = """
schema: 1
tables:
- {id: t, source: here, protocol: p, seconds: 5, tag: V, columns: [total, scene], rows: {A: [1.0, null]}}
"""


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(GOOD)
    (row,) = load_published(path)
    assert {name: number.value for name, number in row.numbers.items()} == {"total": 1.0}


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
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, old, new, message):
    path = tmp_path / "own.yaml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_published(path)


def test_a_table_given_twice_is_refused(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(GOOD + GOOD.split("tables:\n")[1])
    with pytest.raises(ValueError, match="'A' stands twice"):
        load_published(path)
