"""Drift numbers against the definitions written out frame by frame, and curves whose drift is known."""

from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.evaluation.metric import MetricSpec, Score, Window
from longtake.evaluation.results import SCALARS, _drift_scores, _drift_specs

SPEC = MetricSpec(name="vbench/imaging_quality", higher_is_better=True, unit="0..100", range=(0, 100), scale=0.01)
FPS = 16.0


def _score(values, *, frames=32, **changes):
    windows = tuple(Window(start_frame=i * frames, num_frames=frames, value=v) for i, v in enumerate(values))
    return Score(value=1.0, windows=windows, **changes)


def _values(score, *, spec=SPEC, fps=FPS):
    scores = _drift_scores(spec, score, fps)
    assert list(scores) == [s.name for s in _drift_specs(spec)]
    return {name: scores[f"drift/{spec.name}/{name}"] for name in SCALARS}


def _reference(values, *, frames=32, fps=FPS):
    """Every frame has its window's value; spans and chunks are whole frames."""
    per_frame = np.repeat(values, frames)
    n, span = len(per_frame), int(5 * fps)
    first, last = per_frame[:span].mean(), per_frame[-span:].mean()
    chunks = per_frame.reshape(10, -1).mean(axis=1)
    share = round(0.15 * n)
    vde = {
        weight: sum(f(10 - i + 1) * abs(chunks[i - 1] - chunks[0]) / chunks[0] for i in range(2, 11))
        for weight, f in (("linear", float), ("log", log))
    }
    minutes = (np.arange(len(values)) + 0.5) * frames / fps / 60
    return {
        "first5": first,
        "last5": last,
        "delta5": first - last,
        "abs": abs(first - last),
        "helios15": abs(per_frame[:share].mean() - per_frame[-share:].mean()),
        "vde_linear": vde["linear"],
        "vde_log": vde["log"],
        "slope_per_minute": np.polyfit(minutes, values, 1)[0],
        "last_over_first": last / first,
    }


@given(st.lists(st.floats(0.1, 100.0), min_size=10, max_size=60).filter(lambda v: len(v) % 5 == 0))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_numbers_are_those_of_the_definitions(values):
    # 32 frames in a window and a number of windows that 5 divides: tenths are whole frames, and so are 15 %.
    numbers = {name: score.value for name, score in _values(_score(values)).items()}
    assert numbers == pytest.approx(_reference(np.array(values)), rel=1e-9, abs=1e-9)


def test_a_line_has_its_slope_and_a_constant_has_no_drift():
    line = {name: score.value for name, score in _values(_score([10.0 - i * 0.1 for i in range(30)])).items()}
    assert line["slope_per_minute"] == pytest.approx(-3.0)
    assert line["delta5"] == pytest.approx(line["abs"]) and line["delta5"] > 0
    rising = {name: score.value for name, score in _values(_score([1.0 + i for i in range(30)])).items()}
    assert rising["delta5"] == -rising["abs"] < 0
    flat = {name: score.value for name, score in _values(_score([7.0] * 30)).items()}
    zero = {n: 0.0 for n in SCALARS}
    assert flat == pytest.approx({**zero, "first5": 7.0, "last5": 7.0, "last_over_first": 1.0})


def test_early_deviations_weigh_most_in_vde():
    early = _values(_score([1.0] * 3 + [2.0] * 3 + [1.0] * 24))
    late = _values(_score([1.0] * 27 + [2.0] * 3))
    assert early["vde_linear"].value == pytest.approx(9.0)
    assert late["vde_linear"].value == pytest.approx(1.0)
    assert early["vde_log"].value > 0 == late["vde_log"].value


def test_windows_of_five_seconds_and_a_longer_last_one():
    windows = (Window(start_frame=0, num_frames=80, value=0.5), Window(start_frame=80, num_frames=110, value=0.25))
    values = _values(Score(value=0.4, windows=windows))
    assert (values["first5"].value, values["last5"].value, values["last_over_first"].value) == (0.5, 0.25, 0.5)


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        (_score([1.0] * 4, frames=32), "needs 10 s of video; this one has 8.00 s"),
        (Score(value=1.0), "has no curve"),
        (Score.none("needs weights"), "needs weights"),
        (_score([None] * 9), "has no curve"),
    ],
)
def test_what_has_no_drift_says_why_in_every_number(score, reason):
    for value in _values(score).values():
        assert value.value is None and reason in value.skipped


def test_a_number_that_is_not_defined_does_not_take_the_others_along():
    values = _values(_score([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]))
    assert {name for name, score in values.items() if score.value is None} == {
        "vde_linear",
        "vde_log",
        "last_over_first",
    }
    assert "not above 0" in values["last_over_first"].skipped
    gap = _values(_score([1.0, None, 2.0, 3.0, None, None, None]))
    assert "no value between 9 s and 14 s" in gap["last5"].skipped
    assert (gap["first5"].value, gap["first5"].skipped) == ((2 * 1.0 + 1 * 2.0) / 3, None)


def test_what_the_numbers_are_called_and_which_way_is_better():
    specs = {spec.name.rsplit("/", 1)[1]: spec for spec in _drift_specs(SPEC)}
    assert specs["delta5"].name == "drift/vbench/imaging_quality/delta5"
    assert not any(spec.comparable_to_published for spec in specs.values())
    assert (specs["first5"].scale, specs["vde_log"].scale, specs["delta5"].unit) == (0.01, 1.0, "0..100")
    lower = {s.name.rsplit("/", 1)[1]: s for s in _drift_specs(MetricSpec(name="proxy/warp", higher_is_better=False))}
    neither = {s.name.rsplit("/", 1)[1]: s for s in _drift_specs(MetricSpec(name="proxy/luma", higher_is_better=None))}
    better = {name: [group[name].higher_is_better for group in (specs, lower, neither)] for name in SCALARS}
    assert better["last5"] == better["slope_per_minute"] == better["last_over_first"] == [True, False, None]
    assert better["delta5"] == [False, True, None]
    assert better["abs"] == better["helios15"] == better["vde_log"] == [False, False, False]


def test_there_is_no_drift_of_a_drift_and_a_rate_is_needed():
    spec = _drift_specs(SPEC)[0]
    assert _drift_specs(spec) == ()
    assert _drift_scores(spec, _score([1.0] * 10), FPS) == {}
    with pytest.raises(ValueError, match="fps=0"):
        _drift_scores(SPEC, _score([1.0] * 10), 0.0)
