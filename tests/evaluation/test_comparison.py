"""Comparisons of runs: every figure against the plain way to get it, reasons where there is none, and bad input."""

import json
from dataclasses import replace

import numpy as np
import pytest

from longtake.evaluation.comparison import compare_runs
from longtake.evaluation.intervals import column_pairs, holm, mean_interval
from longtake.evaluation.metric import MetricSpec, Score, Window
from longtake.evaluation.records import ManifestLine, RunScores, VideoScores
from longtake.evaluation.scores import QUALITY, TOTALS

FPS = 16.0
SPECS = {
    "vbench/imaging_quality": MetricSpec(name="vbench/imaging_quality", higher_is_better=True, scale=0.01),
    "vbench/subject_consistency": MetricSpec(
        name="vbench/subject_consistency", higher_is_better=True, grouping="frame"
    ),
    "proxy/cuts": MetricSpec(name="proxy/cuts", higher_is_better=False, range=(0, None)),
}
GAIN = {"full": 0.0, "sink": 6.0, "pack": 0.0}


def _windows(values, frames=32):
    return tuple(Window(start_frame=i * frames, num_frames=frames, value=v) for i, v in enumerate(values))


def _run(label, *, num_prompts=12, num_seeds=2, num_windows=16, seed_shift=0, text="prompt {}"):
    rng = np.random.default_rng(11)
    own = np.random.default_rng([12, len(label)])
    videos = []
    for p in range(num_prompts):
        for s in range(num_seeds):
            level = 60 + 5 * rng.normal() + GAIN[label] + 0.5 * own.normal()
            curve = [level - 0.3 * i for i in range(num_windows)]
            scores = {
                "vbench/imaging_quality": Score(value=level, windows=_windows(curve)),
                "vbench/subject_consistency": Score(value=0.9 + 0.001 * level, weight=10.0 + p),
                "proxy/cuts": Score.none("no cuts to count") if label == "pack" else Score(value=float(p % 2)),
            }
            line = ManifestLine(
                id=f"p{p:04d}-{s}",
                file=f"videos/p{p:04d}-{s}.mp4",
                prompt=text.format(p),
                prompt_index=p,
                seed_index=s,
                seed=100 * p + s + seed_shift,
                fps=FPS,
            )
            videos.append(VideoScores(video=line, scores=scores))
    return RunScores(label=label, specs=SPECS, videos=videos)


@pytest.fixture(scope="module")
def runs():
    return [_run("full"), _run("sink"), _run("pack")]


@pytest.fixture(scope="module")
def comparison(runs):
    return compare_runs(runs, baseline="full", num_resamples=500)


def _window_values(run, start_s):
    return {
        (v.video.prompt_index, v.video.seed_index): 0.01 * w.value
        for v in run.videos
        for w in v.scores["vbench/imaging_quality"].windows
        if w.start_frame == start_s * FPS
    }


def test_means_and_differences_are_those_of_the_values(comparison, runs):
    cells = comparison["metrics"]["vbench/imaging_quality"]
    scaled = {run.label: {k: 0.01 * v for k, v in run.values("vbench/imaging_quality").items()} for run in runs}
    for label, values in scaled.items():
        expected = mean_interval(values, num_resamples=500)
        cell = cells["runs"][label]
        assert [cell["mean"], cell["low"], cell["high"]] == pytest.approx(
            [expected.mean, expected.low, expected.high], rel=1e-12
        )
        assert (cell["num_videos"], cell["num_prompts"]) == (24, 12)
    columns = {label: np.array([[values[key]] for key in sorted(values)]) for label, values in scaled.items()}
    prompts = np.array([prompt for prompt, _ in sorted(scaled["full"])])
    pairs = {
        name: column_pairs(columns[name], columns["full"], prompts, num_resamples=500)[0] for name in ("sink", "pack")
    }
    adjusted = holm({name: pair.sign_p for name, pair in pairs.items()})
    for name, pair in pairs.items():
        cell = cells["paired"][name]
        assert cell["difference"] == pytest.approx(pair.difference)
        assert [cell["low"], cell["high"], cell["minimum_detectable"]] == pytest.approx(
            [pair.low, pair.high, pair.minimum_detectable]
        )
        assert (cell["num_pairs"], cell["num_prompts"], cell["sign_p"]) == (24, 12, pair.sign_p)
        assert cell["holm_p"] == adjusted[name]
    assert cells["paired"]["sink"]["significant"] is True
    assert cells["paired"]["pack"]["significant"] is False
    assert "full" not in cells["paired"]


def test_videos_weigh_in_the_mean_as_their_scores_say(comparison, runs):
    cell = comparison["metrics"]["vbench/subject_consistency"]["runs"]["sink"]
    scores = [video.scores["vbench/subject_consistency"] for video in runs[1].videos]
    expected = sum(s.value * s.weight for s in scores) / sum(s.weight for s in scores)
    assert cell["mean"] == pytest.approx(expected, rel=1e-12)
    assert abs(cell["mean"] - np.mean([s.value for s in scores])) > 1e-6


def test_curves_are_means_of_windows_with_their_bands(comparison, runs):
    for run in runs:
        curve = comparison["metrics"]["vbench/imaging_quality"]["curves"][run.label]
        assert [(row["start_s"], row["end_s"]) for row in curve] == [(2.0 * i, 2.0 * i + 2) for i in range(16)]
        expected = mean_interval(_window_values(run, 6), num_resamples=500)
        assert [curve[3]["mean"], curve[3]["low"], curve[3]["high"]] == pytest.approx(
            [expected.mean, expected.low, expected.high]
        )
        assert curve[3]["num_videos"] == 24
    assert comparison["metrics"]["proxy/cuts"]["curves"] == {}


def test_a_moment_is_the_windows_inside_the_five_seconds_before_it(comparison, runs):
    at = comparison["metrics"]["vbench/imaging_quality"]["at"]
    for moment, starts in (("5", (0, 2)), ("30", (26, 28))):
        parts = [_window_values(runs[1], start) for start in starts]
        values = {key: np.mean([part[key] for part in parts]) for key in parts[0]}
        cell = at[moment]["runs"]["sink"]
        assert cell["mean"] == pytest.approx(mean_interval(values).mean)
        assert at[moment]["paired"]["sink"]["difference"] == pytest.approx(0.06, abs=0.01)
    assert "no video has a window" in at["60"]["runs"]["sink"]["skipped"]
    assert "skipped" in at["60"]["paired"]["sink"]
    assert "no curve" in comparison["metrics"]["proxy/cuts"]["at"]["5"]["runs"]["full"]["skipped"]


def test_moments_of_windows_of_five_seconds_and_of_odd_rates():
    def at(moment, *, frames, num_windows, fps):
        run = _run("full", num_prompts=2)
        videos = []
        for video in run.videos:
            score = Score(value=1.0, windows=_windows([float(i) for i in range(num_windows)], frames))
            videos.append(VideoScores(video=replace(video.video, fps=fps), scores={"vbench/imaging_quality": score}))
        result = compare_runs([replace(run, videos=videos)], baseline="full", moments=[moment], num_resamples=10)
        return result["metrics"]["vbench/imaging_quality"]["at"][f"{moment:g}"]["runs"]["full"].get("mean")

    assert at(30, frames=80, num_windows=12, fps=16.0) == pytest.approx(0.05)
    assert at(60, frames=80, num_windows=12, fps=16.0) == pytest.approx(0.11)
    assert at(30, frames=48, num_windows=20, fps=23.976) == pytest.approx(0.135)
    assert at(60, frames=32, num_windows=28, fps=16.0) is None  # 56 s
    assert at(30, frames=31, num_windows=15, fps=16.0) == pytest.approx(0.135)  # 29.06 s


def test_what_is_missing_says_why_and_nothing_is_nan(comparison):
    cuts = comparison["metrics"]["proxy/cuts"]
    assert cuts["runs"]["pack"] == {"skipped": "no cuts to count"}
    assert "no prompt and seed" in cuts["paired"]["pack"]["skipped"]
    for label in comparison["labels"]:
        for cell in comparison["scores"][label].values():
            assert cell["value"] is None and "aesthetic_quality" in cell["reason"]
    text = json.dumps(comparison, allow_nan=False)
    assert json.loads(text)["metrics"]["proxy/cuts"]["spec"]["range"] == [0, None]


def test_a_measure_of_some_runs_only():
    full, sink = _run("full"), _run("sink")
    extra = MetricSpec(name="proxy/extra", higher_is_better=None)
    score = VideoScores(video=sink.videos[0].video, scores={"proxy/extra": Score(value=2.0)})
    sink = replace(sink, specs={**sink.specs, "proxy/extra": extra}, videos=[score, *sink.videos[1:]])
    full = replace(full, skipped={"proxy/extra": "needs a camera"})
    cells = compare_runs([full, sink], baseline="full", num_resamples=10)["metrics"]["proxy/extra"]
    assert cells["runs"]["full"] == {"skipped": "needs a camera"}
    assert cells["runs"]["sink"]["mean"] == 2.0
    assert (cells["runs"]["sink"]["low"], cells["runs"]["sink"]["reason"]) == (None, "an interval needs two prompts")


def test_totals_stand_where_all_members_are_measured(runs):
    members = [f"vbench/{name}" for name in QUALITY]
    specs = {
        name: MetricSpec(name=name, higher_is_better=True, scale=0.01 if "imaging" in name else 1.0)
        for name in members
    }
    scores = {name: Score(value=0.8 / spec.scale) for name, spec in specs.items()}
    videos = [VideoScores(video=video.video, scores=scores) for video in runs[0].videos]
    run = replace(runs[0], specs=specs, videos=videos)
    alone = compare_runs([run], baseline="full", num_resamples=10)
    assert all(not cells["paired"] for cells in alone["metrics"].values()), "one run has no differences"
    totals = alone["scores"]["full"]
    assert totals["quality7"]["value"] == pytest.approx(TOTALS["quality7"](dict.fromkeys(members, 0.8))[0])
    assert "vbench/object_class" in totals["total"]["reason"]
    assert set(totals) == {"quality7", "quality6_long", "total"}


def test_the_same_runs_give_the_same_bytes_in_any_order_of_videos(runs):
    backwards = [replace(run, videos=list(reversed(run.videos))) for run in runs]
    first, second = (json.dumps(compare_runs(r, baseline="full", num_resamples=200)) for r in (runs, backwards))
    assert first == second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: ([], {}), "no run to compare"),
        (lambda r: ([r[0], r[0]], {}), "two runs are called 'full'"),
        (lambda r: (r, {"baseline": "nil"}), "baseline='nil' is none of the runs full, sink"),
        (lambda r: (r, {"moments": [5, -1]}), "holds -1"),
        (lambda r: ([r[0], replace(r[1], videos=[*r[1].videos, r[1].videos[0]])], {}), "twice"),
        (lambda r: ([r[0], _run("sink", seed_shift=7)], {}), "same seeds"),
        (lambda r: ([r[0], _run("sink", text="other {}")], {}), "one list of prompts"),
    ],
)
def test_bad_input_is_refused(runs, change, message):
    given, settings = change(runs[:2])
    with pytest.raises(ValueError, match=message):
        compare_runs(given, **{"baseline": "full", **settings})
