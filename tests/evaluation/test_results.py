"""Results of a run: means as the specs say, reasons instead of zeros, the same bytes for the same numbers."""

import json
from dataclasses import asdict, replace

import pytest

from longtake.evaluation.metric import MetricSpec, Score, Window
from longtake.evaluation.records import ManifestLine, RunScores, VideoScores, write_json, write_manifest
from longtake.evaluation.results import _with_drift, load_run, results_json, run_record
from longtake.evaluation.scores import QUALITY, TOTALS

SPECS = {
    spec.name: spec
    for spec in (
        MetricSpec(name="proxy/level", higher_is_better=True, unit="px"),
        MetricSpec(name="vbench/imaging_quality", higher_is_better=True, scale=0.01, backbone="MUSIQ"),
        MetricSpec(name="vbench/subject_consistency", higher_is_better=True, grouping="frame"),
        MetricSpec(name="proxy/never", higher_is_better=None),
    )
}


def make_scores(prompt, seed, frames):
    """Four numbers of one video; the level falls by a tenth per window."""
    windows = tuple(Window(start_frame=16 * i, num_frames=16, value=prompt - 0.1 * i) for i in range(frames // 16))
    return {
        "proxy/level": Score(value=prompt + 0.5 * seed, windows=windows),
        "vbench/imaging_quality": Score(value=50.0 + prompt),
        "vbench/subject_consistency": Score(value=0.5 if prompt else 0.8, weight=frames - 1.0, details={"n": frames}),
        "proxy/never": Score.none("this video has no object"),
    }


def make_video(prompt, seed, frames=96):
    line = ManifestLine(
        id=f"p{prompt:04d}-{seed}",
        file=f"videos/p{prompt:04d}-{seed}.mp4",
        prompt=f"text {prompt}",
        prompt_index=prompt,
        seed_index=seed,
        num_frames=frames,
        fps=8.0,
        encoder={"codec": "h264", "crf": 12},
    )
    return VideoScores(video=line, scores=make_scores(prompt, seed, frames))


VIDEOS = [make_video(prompt, seed, 96 if prompt else 161) for prompt in range(3) for seed in range(2)]


def write_run(folder, videos=tuple(VIDEOS), *, specs=SPECS, order=None):
    record = run_record(
        "pack", {"protocol": "quick"}, [asdict(s) for s in specs.values()], {"vbench/color": "official"}
    )
    write_json(folder / "run.json", record)
    for video in videos:
        write_json(folder / "scores" / f"{video.video.id}.json", video.to_json())
    if order is not None:
        write_manifest(folder / "manifest.jsonl", [videos[index].video for index in order])
    return folder


def test_a_run_is_read_back_as_it_was_written(tmp_path):
    write_json(write_run(tmp_path) / "costs.json", {"kv_mb": 3.0})
    run = load_run(tmp_path)
    assert run.label == "pack" and run.costs == {"kv_mb": 3.0} and run.skipped == {"vbench/color": "official"}
    assert [video.video for video in run.videos] == [video.video for video in VIDEOS]
    for read, made in zip(run.videos, VIDEOS, strict=True):
        assert {name: read.scores[name] for name in SPECS} == made.scores
    assert {name: run.specs[name] for name in SPECS} == SPECS


def test_the_order_of_files_and_work_does_not_show(tmp_path):
    plain = results_json(load_run(write_run(tmp_path / "a")))
    listed = results_json(load_run(write_run(tmp_path / "b", VIDEOS[::-1], order=range(5, -1, -1))))
    assert json.dumps(plain, sort_keys=True) == json.dumps(listed, sort_keys=True)
    write_json(tmp_path / "one.json", plain)
    write_json(tmp_path / "two.json", results_json(load_run(tmp_path / "a")))
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def test_means_follow_weights_and_scales(tmp_path):
    metrics = results_json(load_run(write_run(tmp_path)))["metrics"]
    level = metrics["proxy/level"]
    assert level["value"] == pytest.approx((0 + 0.5 + 1 + 1.5 + 2 + 2.5) / 6) and level["n_videos"] == 6
    assert level["n_prompts"] == 3 and level["ci95"][0] < level["value"] < level["ci95"][1]
    # VBench's imaging quality is 0..100 per video and 0..1 in the mean.
    assert metrics["vbench/imaging_quality"]["value"] == pytest.approx(0.51)
    assert metrics["vbench/imaging_quality"]["per_video"][0]["value"] == 50.0
    # A mean over frames: a longer video counts for more; the plain mean over videos would be 0.6.
    frames = metrics["vbench/subject_consistency"]
    assert frames["value"] == pytest.approx((2 * 160 * 0.8 + 4 * 95 * 0.5) / (2 * 160 + 4 * 95))
    assert frames["value"] != pytest.approx(0.6, abs=0.01) and frames["provenance"]["grouping"] == "frame"
    assert frames["per_video"][0]["details"] == {"n": 161}
    lone = results_json(load_run(write_run(tmp_path / "lone", VIDEOS[:2])))["metrics"]["proxy/level"]
    assert lone["value"] == 0.25 and lone["ci95"] is None and lone["skipped"] is None, "one prompt"


def test_what_is_missing_has_a_reason_and_never_a_number(tmp_path):
    values = results_json(load_run(write_run(tmp_path)))
    never = values["metrics"]["proxy/never"]
    assert never["value"] is None and never["ci95"] is None and never["skipped"] == "this video has no object"
    assert never["n_videos"] == 0 and never["per_video"][0]["skipped"] == "this video has no object"
    color = values["metrics"]["vbench/color"]
    assert (color["value"], color["skipped"], color["n_videos"], color["per_video"]) == (None, "official", 0, [])
    assert all(entry.keys() == never.keys() for entry in values["metrics"].values())
    assert all(entry["provenance"].keys() == color["provenance"].keys() for entry in values["metrics"].values())
    scores, reasons = values["scores"], values["scores"]["reasons"]
    assert scores.keys() - {"reason", "reasons"} == reasons.keys() == set(TOTALS)
    assert all(scores[name] is None and "missing: " in reasons[name] for name in TOTALS)
    assert scores["reason"] == reasons["quality7"]
    assert "aesthetic_quality" in scores["reason"] and "vbench/" not in scores["reason"]
    assert "imaging_quality" not in scores["reason"] and "long/imaging_quality" in reasons["quality6_long"]


def test_a_score_is_a_number_where_all_members_are_there(tmp_path):
    specs = {f"vbench/{name}": MetricSpec(name=f"vbench/{name}", higher_is_better=True) for name in QUALITY}
    videos = [VideoScores(video=v.video, scores={name: Score(value=0.9) for name in specs}) for v in VIDEOS]
    scores = results_json(load_run(write_run(tmp_path, videos, specs=specs)))["scores"]
    expected, _ = TOTALS["quality7"](dict.fromkeys(specs, 0.9))
    assert scores["quality7"] == pytest.approx(expected) and scores["reason"] is None
    assert scores["total"] is None and "color" in scores["reasons"]["total"]


@pytest.mark.parametrize(
    ("name", "formula", "expected"),
    [
        ("vbench/long_dev/subject_consistency", "vbench@45e79ec long", ("vbench@45e79ec", True, False)),
        ("vbench_form/long/subject_consistency[enc=X]", "vbench@45e79ec long", ("vbench@45e79ec", False, False)),
        ("vbench/temporal_flickering", "vbench@45e79ec", ("vbench@45e79ec", None, False)),
        ("vbench/scene", "vbench, commit not recorded", ("vbench", None, False)),
        ("drift/proxy/level/helios", "Helios", ("ours", None, None)),
    ],
)
def test_provenance_tells_the_switches_of_vbench(tmp_path, name, formula, expected):
    specs = {name: MetricSpec(name=name, higher_is_better=True, formula=formula)}
    videos = [VideoScores(video=VIDEOS[0].video, scores={name: Score(value=0.5)})]
    entry = results_json(load_run(write_run(tmp_path, videos, specs=specs)))["metrics"][name]["provenance"]
    assert (entry["formula"], entry["dev_flag"], entry["static_filter"]) == expected
    assert entry["source"] == formula


def test_ranges_and_units_are_those_of_the_value(tmp_path):
    spec = MetricSpec(name="vbench/i", higher_is_better=True, scale=0.01, unit="0..100", range=(0.0, 100.0))
    videos = [VideoScores(video=VIDEOS[0].video, scores={spec.name: Score(value=60.0)})]
    entry = results_json(load_run(write_run(tmp_path, videos, specs={spec.name: spec})))["metrics"][spec.name]
    assert (entry["value"], entry["range"], entry["unit"]) == (0.6, [0.0, 1.0], "0..1")
    assert (entry["per_video"][0]["value"], entry["per_video_range"]) == (60.0, [0.0, 100.0])


def test_every_curve_has_its_drift(tmp_path):
    run = load_run(write_run(tmp_path))
    drift = {name for name in run.specs if name.startswith("drift/")}
    assert drift and all(name.startswith("drift/proxy/level/") for name in drift)
    first = run.videos[2].scores["drift/proxy/level/slope_per_minute"]
    assert first.value == pytest.approx(-0.1 * 30)  # a tenth per two seconds
    names = results_json(run)["metrics"]
    assert names["drift/proxy/level/slope_per_minute"]["comparable_to_published"] is False
    plain = RunScores(label="x", specs={}, videos=[replace(video, scores={}) for video in VIDEOS])
    assert _with_drift(plain).specs == {}


def test_the_tool_and_the_codec_are_named(tmp_path):
    values = results_json(load_run(write_run(tmp_path)))
    assert values["tool"]["name"] == "longtake" and set(values["tool"]) == {"name", "version", "git"}
    assert values["run"] == {"label": "pack", "num_videos": 6, "protocol": "quick"}
    assert values["metrics"]["proxy/level"]["provenance"]["codec"] == {"codec": "h264", "crf": 12}
    other = replace(VIDEOS[5], video=replace(VIDEOS[5].video, encoder={}))
    mixed = results_json(load_run(write_run(tmp_path / "mixed", [*VIDEOS[:5], other])))
    assert mixed["metrics"]["proxy/level"]["provenance"]["codec"] == {"mixed": [{"codec": "h264", "crf": 12}, {}]}


def test_folders_that_are_no_runs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is no run of an evaluation: it has no run.json"):
        load_run(tmp_path)
    fewer = {name: spec for name, spec in SPECS.items() if name != "proxy/never"}
    with pytest.raises(ValueError, match="p0000-0 was measured with other metrics .proxy/never."):
        load_run(write_run(tmp_path, specs=fewer))
