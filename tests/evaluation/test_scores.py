"""VBench's Quality, Semantic and Total: published rows, and no score without all its members."""

import pytest

from longtake.evaluation.scores import QUALITY, SEMANTIC, member_name, quality6_long, quality7, semantic, total

# Recency Forcing, 60 s: Quality, then dynamic, smoothness, flickering, imaging, aesthetic, subject, background.
PUBLISHED = [
    (80.11, 34.50, 98.48, 97.77, 65.93, 56.55, 96.97, 96.24),
    (81.98, 42.85, 98.75, 97.61, 68.71, 61.48, 97.09, 95.99),
    (84.02, 75.48, 98.00, 96.32, 70.50, 61.31, 97.68, 96.49),
]
ORDER = (
    "dynamic_degree",
    "motion_smoothness",
    "temporal_flickering",
    "imaging_quality",
    "aesthetic_quality",
    "subject_consistency",
    "background_consistency",
)
ALL = {f"vbench/{name}": 0.5 for name in (*QUALITY, *SEMANTIC)}


@pytest.mark.parametrize("row", PUBLISHED)
def test_published_qualities_come_out(row):
    values = {f"vbench/{name}": value / 100 for name, value in zip(ORDER, row[1:], strict=True)}
    score, reason = quality7(values)
    assert reason is None
    assert 100 * score == pytest.approx(row[0], abs=0.01)


def test_six_dimensions_leave_flickering_out_and_say_two_points_less():
    values = {f"vbench/long/{name}": value / 100 for name, value in zip(ORDER, PUBLISHED[0][1:], strict=True)}
    del values["vbench/long/temporal_flickering"]
    assert 100 * quality6_long(values)[0] == pytest.approx(77.59, abs=0.01)
    assert quality7(values, variant="long") == (None, "missing: vbench/long/temporal_flickering")


def test_the_development_flag_changes_the_two_consistencies_only():
    assert member_name("subject_consistency", "long_dev") == "vbench/long_dev/subject_consistency"
    assert member_name("imaging_quality", "long_dev") == "vbench/long/imaging_quality"
    values = {member_name(name, "long_dev"): 0.9 for name in QUALITY}
    assert quality6_long(values, variant="long_dev")[0] is not None
    assert quality6_long(values)[0] is None


@pytest.mark.parametrize("score", [quality7, semantic, total])
def test_a_missing_member_means_no_score(score):
    assert score(ALL)[0] is not None
    members = [name for name in ALL if score({**ALL, name: None})[0] is None]
    assert len(members) == {quality7: 7, semantic: 9, total: 16}[score]
    for name in members:
        without = {key: value for key, value in ALL.items() if key != name}
        assert score(without) == (None, f"missing: {name}")


def test_all_missing_members_are_named():
    value, reason = total({"vbench/imaging_quality": 0.7})
    assert value is None
    assert reason.count("vbench/") == 15
    assert "imaging" not in reason


def test_the_formula_with_another_network_does_not_count():
    values = {**ALL, "vbench_form/subject_consistency[enc=hog+hist]": 0.9}
    del values["vbench/subject_consistency"]
    assert quality7(values) == (None, "missing: vbench/subject_consistency")


def test_a_member_of_value_zero_is_not_missing():
    assert quality7({**ALL, "vbench/dynamic_degree": 0.0})[1] is None


def test_a_value_out_of_100_is_refused():
    with pytest.raises(ValueError, match="imaging_quality=69.3 .* scale 0.01"):
        quality7({**ALL, "vbench/imaging_quality": 69.3})
