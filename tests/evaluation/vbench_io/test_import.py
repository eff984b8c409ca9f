"""Imports: the official examples, every layout, scales and flags told from the numbers, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from longtake.evaluation.metric import MetricSpec, Score
from longtake.evaluation.records import RunScores, VideoScores, read_manifest
from longtake.evaluation.scores import QUALITY, SEMANTIC, TOTALS
from longtake.evaluation.vbench_io import (
    import_results,
    merge_imported,
    read_imported,
    write_imported,
)

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "vbench" / "golden.json"


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


@pytest.fixture
def write(tmp_path):
    def write_file(content, name="results_x_eval_results.json", info=None):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        if info is not None:
            (path.parent / "run_info.json").write_text(json.dumps(info))
        return path

    return write_file


@pytest.fixture
def run(make_run):
    """A run of four videos of 100 frames, which VBench-Long cuts into four clips."""
    lines = read_manifest(make_run(prompts=2, seeds=2) / "manifest.jsonl")
    return RunScores(label="pack", specs={}, videos=[VideoScores(video=line, scores={}) for line in lines])


def _short(values, folder="/x/videos"):
    paths = [f"{folder}/p{i // 2:04d}-{i % 2}.mp4" for i in range(len(values))]
    rows = [{"video_path": path, "video_results": value} for path, value in zip(paths, values, strict=True)]
    return [sum(values) / len(values), rows]


def _clips(values, *, is_fused, dev=True, mapped=0.9, scale=1.0):
    """values: {video: [per clip]}."""
    rows = []
    for video, clips in values.items():
        for index, value in enumerate(clips):
            path = f"/x/videos/split_clip/{video}/{video}_{index:03d}.mp4"
            row = {"video_path": path, "video_results": value}
            if is_fused:
                fused = 0.5 * (value + mapped) if dev and mapped else value
                row = {
                    "video_path": f"{path}/{video}.mp4",
                    "inclip_score": value,
                    "clip2clip_score": 0.8 if mapped else 0,
                    "mapped_clip2clip_score": mapped,
                    "video_results": fused,
                }
            rows.append(row)
    mean = scale * sum(row["video_results"] for row in rows) / len(rows)
    return [mean, rows] if is_fused else [mean, rows, rows]


FOUR = {"p0000-0": [0.9, 0.8, 0.7, 0.6], "p0001-1": [0.5, 0.5, 0.5, 0.5]}


def test_the_official_example_comes_in(golden, write):
    example = golden["official_json_example"]["results_example_eval_results.json"]
    (result,) = import_results([write(example)]).values()
    assert result.metric == "vbench/temporal_flickering"
    assert result.official_score == 0.9436041065290862
    assert {entry.video: entry.value for entry in result.entries} == {
        "static clip-0": 1.0,
        "flicker clip-0": 0.8872082130581724,
    }
    assert str(result).startswith("0.9436 over 2 videos, official VBench")


def test_the_official_example_of_names_with_underscores_comes_in_with_its_warning(golden, write):
    path = write(golden["long_PITFALL_underscore_names_dev_flag"])
    with pytest.raises(ValueError, match="say dev_flag=True or False"):
        import_results([path])
    result = import_results([path], dev_flag=True)["vbench/long_dev/subject_consistency"]
    assert result.official_score == pytest.approx(sum(e.value for e in result.entries) / 7, abs=1e-9)
    assert "no clip-to-clip term for 7 of 7 clips" in result.notes[0]


def test_official_fusions_tell_their_flag(golden, write):
    for row in golden["fuse_examples"]:
        entry = {**{k: v for k, v in row.items() if k != "dimension"}, "video_path": "/x/split_clip/v/v_000.mp4/v.mp4"}
        if entry["mapped_clip2clip_score"] == 0:
            continue
        results = import_results([write({row["dimension"]: [row["video_results"], [entry]]})])
        assert list(results) == [f"vbench/long_dev/{row['dimension']}"]


def test_totals_of_imported_scores_are_the_official_ones(golden, write):
    raw = golden["total_score"]["raw"]
    content = {name: _short([value, value]) for name, value in raw.items()}
    content["imaging quality"] = [raw["imaging quality"], _short([100 * raw["imaging quality"]] * 2)[1]]
    values = {name: result.official_score for name, result in import_results([write(content)]).items()}
    assert set(values) == {f"vbench/{name}" for name in {**QUALITY, **SEMANTIC}}
    assert TOTALS["quality7"](values)[0] == pytest.approx(golden["total_score"]["quality"], abs=1e-9)
    assert TOTALS["total"](values)[0] == pytest.approx(golden["total_score"]["total"], abs=1e-9)


def test_short_results_become_metrics_of_the_run(write, run):
    content = {"motion_smoothness": _short([0.9, 0.8, 0.7, 0.6]), "dynamic_degree": _short([True, False, True, True])}
    merged = merge_imported(run, import_results([write(content, info={"dev_flag": None, "commit": "45e79ec14e"})]))
    assert merged.values("vbench/motion_smoothness") == {(0, 0): 0.9, (0, 1): 0.8, (1, 0): 0.7, (1, 1): 0.6}
    assert merged.values("vbench/dynamic_degree") == {(0, 0): 1.0, (0, 1): 0.0, (1, 0): 1.0, (1, 1): 1.0}
    spec = merged.specs["vbench/motion_smoothness"]
    assert (spec.backbone, spec.formula) == ("imported: official VBench", "vbench@45e79ec")
    score = merged.videos[0].scores["vbench/motion_smoothness"]
    assert score.details["provenance"] == "imported: official VBench"
    record = merged.header["imported"]["vbench/motion_smoothness"]
    assert (record["official_score"], record["notes"]) == (pytest.approx(0.75), [])
    assert "/x/" not in json.dumps(merged.header)


def test_dimensions_of_several_files_are_merged_and_replace_what_was_measured(write, run):
    files = [
        write({"motion_smoothness": _short([0.9] * 4)}, "a_eval_results.json"),
        write({"aesthetic_quality": _short([0.6] * 4)}, "b_eval_results.json"),
        write({"motion_smoothness": _clips(FOUR, is_fused=False)}, "c_eval_results.json"),
    ]
    name = "vbench/motion_smoothness"
    spec = MetricSpec(name=name, higher_is_better=True)
    videos = [replace(video, scores={name: Score(value=0.1)}) for video in run.videos]
    own = replace(run, specs={name: spec}, videos=videos, skipped={"vbench/aesthetic_quality": "needs weights"})
    merged = merge_imported(own, import_results(files))
    assert set(merged.specs) == {name, "vbench/aesthetic_quality", "vbench/long/motion_smoothness"}
    assert merged.skipped == {} and set(merged.values(name).values()) == {0.9}
    assert own.values(name)[0, 0] == 0.1


def test_long_results_are_means_of_clips_that_make_a_curve(write, run):
    results = import_results([write({"motion_smoothness": _clips(FOUR, is_fused=False)})])
    merged = merge_imported(run, results)
    name = "vbench/long/motion_smoothness"
    score = merged.videos[0].scores[name]
    assert (score.value, score.weight) == (pytest.approx(0.75), 4.0)
    # 100 frames at 16 a second: clips of 32, the last of which begins in the one before it.
    assert [(w.start_frame, w.num_frames, w.value) for w in score.windows] == [
        (0, 32, 0.9),
        (32, 32, 0.8),
        (64, 32, 0.7),
        (96, 4, 0.6),
    ]
    assert "not in the official results" in merged.videos[1].scores[name].skipped
    assert merged.specs[name].grouping == "clip"


@pytest.mark.parametrize(("dev", "folder"), [(True, "long_dev"), (False, "long")])
def test_fused_results_tell_their_flag_and_contradict_a_wrong_one(write, run, dev, folder):
    content = {"subject_consistency": _clips(FOUR, is_fused=True, dev=dev)}
    merged = merge_imported(run, import_results([write(content)]))
    score = merged.videos[0].scores[f"vbench/{folder}/subject_consistency"]
    assert score.value == pytest.approx(0.825 if dev else 0.75)
    assert ("--dev_flag" in merged.specs[f"vbench/{folder}/subject_consistency"].formula) is True
    with pytest.raises(ValueError, match="results of two runs are mixed"):
        import_results([write(content)], dev_flag=not dev)
    with pytest.raises(ValueError, match="results of two runs are mixed"):
        import_results([write(content, "sub/x.json", info={"dev_flag": not dev})])


def test_the_record_beside_the_results_says_the_flag_where_the_numbers_cannot(write):
    content = {"background_consistency": _clips(FOUR, is_fused=True, mapped=0.0)}
    for dev, folder in ((True, "long_dev"), (False, "long")):
        path = write(content, f"{folder}/x.json", info={"mode": "long_custom_input", "dev_flag": dev})
        assert list(import_results([path])) == [f"vbench/{folder}/background_consistency"]


@pytest.mark.parametrize(("score", "values"), [(0.7, [60.0, 80.0]), (70.0, [60.0, 80.0]), (0.7, [0.6, 0.8])])
def test_imaging_quality_is_per_video_out_of_100_and_a_hundredth_as_score(write, score, values):
    content = {"imaging_quality": [score, _short(values)[1]]}
    (result,) = import_results([write(content)]).values()
    assert result.official_score == pytest.approx(0.7)
    assert [entry.value for entry in result.entries] == pytest.approx([60.0, 80.0])


def test_imaging_quality_of_clips_ends_as_the_official_score(write, run):
    values = {video: [60.0, 70.0, 80.0, 90.0] for video in ("p0000-0", "p0000-1", "p0001-0", "p0001-1")}
    merged = merge_imported(
        run, import_results([write({"imaging_quality": _clips(values, is_fused=False, scale=0.01)})])
    )
    name = "vbench/long/imaging_quality"
    assert merged.specs[name].scale * merged.videos[0].scores[name].value == pytest.approx(0.75)
    assert merged.header["imported"][name]["notes"] == []


def test_pooled_frames_weigh_as_the_tool_has_it(write, run):
    lines = [replace(video.video, num_frames=50 * (i + 1)) for i, video in enumerate(run.videos)]
    run = replace(run, videos=[VideoScores(video=line, scores={}) for line in lines])
    values, weights = [0.9, 0.8, 0.7, 0.6], [49, 99, 149, 199]
    rows = _short(values)[1]
    pooled = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    merged = merge_imported(run, import_results([write({"subject_consistency": [pooled, rows]})]))
    assert [v.scores["vbench/subject_consistency"].weight for v in merged.videos] == weights
    assert merged.header["imported"]["vbench/subject_consistency"]["notes"] == []
    other = merge_imported(run, import_results([write({"subject_consistency": [0.75, rows]})]))
    assert "the mean of its videos is" in other.header["imported"]["vbench/subject_consistency"]["notes"][0]
    objects = [{**row, "success_frame_count": 8, "frame_count": 16} for row in rows]
    counted = merge_imported(run, import_results([write({"object_class": [0.75, objects]})]))
    assert {v.scores["vbench/object_class"].weight for v in counted.videos} == {16.0}


def test_videos_named_by_prompt_find_their_run_and_strange_or_repeated_ones_are_refused(write, run):
    rows = [{"video_path": f"v/scene/prompt {p}-{s}.mp4", "video_results": 0.5} for p in range(2) for s in range(2)]
    assert len(merge_imported(run, import_results([write({"scene": [0.5, rows]})])).values("vbench/scene")) == 4
    rows = [{"video_path": "p0077-0.mp4", "video_results": 0.5}]
    with pytest.raises(ValueError, match="1 videos of scene are not in this run, e.g. 'p0077-0'"):
        merge_imported(run, import_results([write({"scene": [0.5, rows]})]))
    rows = [{"video_path": "p0000-0.mp4", "video_results": 0.5}] * 2
    with pytest.raises(ValueError, match="'p0000-0' stands there twice"):
        merge_imported(run, import_results([write({"scene": [0.5, rows]})]))


def test_results_kept_in_a_run_come_back_and_new_ones_join_them(write, tmp_path):
    assert read_imported(tmp_path) == {}
    first = import_results([write({"scene": _short([0.5, 0.25]), "color": _short([0.1])}, "a.json")])
    write_imported(tmp_path, first)
    assert read_imported(tmp_path) == first
    second = import_results([write({"subject_consistency": _clips(FOUR, is_fused=True)}, "b.json")])
    again = import_results([write({"scene": _short([0.75])}, "c.json")])
    write_imported(tmp_path, {**second, **again})
    assert read_imported(tmp_path) == {**first, **second, **again}
    (tmp_path / "imported.json").write_text('{"a": 3}')
    with pytest.raises(ValueError, match="delete it and import again"):
        read_imported(tmp_path)


ROW = {"video_path": "a.mp4", "video_results": 0.5}
OTHER_WEIGHTS = _clips({"v": [0.9]}, is_fused=True)
OTHER_WEIGHTS[1][0]["video_results"] = 0.123


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no results"),
        ({"subject": [0.5, [ROW]]}, "unknown dimension"),
        ({"scene": 0.5}, "expected"),
        ({"scene": [0.5]}, "expected"),
        ({"scene": [0.5, []]}, "needs one or more values"),
        ({"scene": [0.5, [{"video_results": 0.5}]]}, "each with its video_path"),
        ({"scene": [0.5, [{"video_path": "a.mp4"}]]}, "has no video_results"),
        ({"scene": ["0.5", [ROW]]}, "no finite number"),
        ({"scene": [float("nan"), [ROW]]}, "no finite number"),
        ({"scene": [50.0, [ROW]]}, "outside -1..1"),
        ([ROW], r"give the \*_eval_results.json"),
        ({"subject_consistency": OTHER_WEIGHTS}, "weights other than"),
        ({"imaging_quality": [0.5, _short([60.0, 80.0])[1]]}, "do not fit"),
    ],
)
def test_what_is_no_result_is_refused(write, content, message):
    with pytest.raises(ValueError, match=message):
        import_results([write(content)])


def test_files_that_cannot_be_read_are_named(tmp_path, write):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read VBench results from .*x\.json"):
        import_results([tmp_path / "x.json"])
    with pytest.raises(ValueError, match="no results to import"):
        import_results([])
    with pytest.raises(ValueError, match="must say dev_flag"):
        import_results([write({"scene": [0.5, [ROW]]}, "sub/y.json", info={"dev_flag": "yes"})])
    files = [write({"scene": _short([0.5])}, name) for name in ("a.json", "b.json")]
    with pytest.raises(ValueError, match="b.json, 'scene': vbench/scene comes from a.json too"):
        import_results(files)
