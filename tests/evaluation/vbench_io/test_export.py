"""Exports: names, links, refusals that leave nothing behind, and the script run against a stand-in for the tool."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest

from longtake.evaluation.records import read_manifest, write_manifest
from longtake.evaluation.vbench_io import (
    CUSTOM_DIMENSIONS,
    LONG_DIMENSIONS,
    export_videos,
    import_results,
)

export_custom, export_long, export_standard = (
    partial(export_videos, mode=mode) for mode in ("custom", "long", "standard")
)
FAKE_TOOL = """
import argparse, json, os, sys
p = argparse.ArgumentParser()
p.add_argument("--videos_path"); p.add_argument("--output_path"); p.add_argument("--dimension", nargs="+")
p.add_argument("--mode"); p.add_argument("--prompt_file"); p.add_argument("--full_json_dir")
p.add_argument("--dev_flag", action="store_true")
a = p.parse_args()
names = sorted(n for n in os.listdir(a.videos_path) if n.endswith(".mp4"))
if a.prompt_file:
    assert set(json.load(open(a.prompt_file))) == set(names)
scale = 100 if a.dimension == ["imaging_quality"] else 1
rows = [{"video_path": os.path.join(a.videos_path, n), "video_results": 0.5 * scale} for n in names]
if "long" in a.mode:
    for r in rows:
        stem = os.path.basename(r["video_path"])[:-4]
        r["video_path"] = os.path.join(a.videos_path, "split_clip", stem, stem + "_000.mp4")
        if "consistency" in a.dimension[0]:
            r.update(inclip_score=0.5, clip2clip_score=0.4, mapped_clip2clip_score=0.9)
            r["video_results"] = 0.7 if a.dev_flag else 0.5
score = 0.7 if a.dev_flag and "consistency" in a.dimension[0] else 0.5
content = [score, rows] if "long" not in a.mode or "consistency" in a.dimension[0] else [score, rows, rows]
with open(os.path.join(a.output_path, "results_2026-01-01-00:00:00_eval_results.json"), "w") as f:
    json.dump({a.dimension[0]: content}, f)
with open(os.path.join(a.output_path, "seen.json"), "w") as f:
    json.dump(vars(a), f)
"""


@pytest.fixture
def tool(tmp_path):
    home = tmp_path / "VBench"
    (home / "vbench2_beta_long").mkdir(parents=True)
    (home / "evaluate.py").write_text(FAKE_TOOL)
    (home / "vbench2_beta_long" / "eval_long.py").write_text(FAKE_TOOL)
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "python").symlink_to(sys.executable)

    def run(out, **changes):
        env = {**os.environ, "VBENCH_HOME": str(home), "PATH": f"{binaries}:{os.environ['PATH']}", **changes}
        return subprocess.run([str(out / "run.sh")], env=env, capture_output=True, text=True, timeout=60)

    return run


def _full_info(
    path, num=3, dimensions=("subject_consistency", "dynamic_degree", "motion_smoothness"), text="prompt {}"
):
    entries = [{"prompt_en": text.format(i), "dimension": list(dimensions)} for i in range(num)]
    entries.append({"prompt_en": "a park", "dimension": ["scene", "background_consistency"]})
    path.write_text(json.dumps(entries))
    return path


def test_custom_has_links_prompts_and_a_record_under_names_without_underscores(make_run, tmp_path):
    run = make_run(name="a_long_{}_{}")
    out = tmp_path / "out"
    export = export_custom(run, out)
    names = sorted(path.name for path in (out / "videos").iterdir())
    assert names == sorted(f"p{p:04d}-{s}.mp4" for p in range(3) for s in range(2))
    assert (out / "videos" / "p0002-1.mp4").samefile(run / "videos" / "a_long_2_1.mp4")
    prompts = json.loads((out / "prompt_file.json").read_text())
    assert prompts == {name: f"prompt {int(name[1:5])}" for name in names}
    record = json.loads((out / "export.json").read_text())
    assert (record["mode"], record["dev_flag"], record["files"]["p0001-0.mp4"]) == ("custom_input", None, "a_long_1_0")
    assert export.dimensions == CUSTOM_DIMENSIONS
    assert any("VBench-Long" in note for note in export.notes)  # 6.25 s
    assert all(f"`{name}`" in (out / "README.md").read_text() for name in CUSTOM_DIMENSIONS)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize("mode", ["custom", "long", "long_dev"])
def test_the_script_scores_every_dimension_and_its_results_come_back(make_run, tmp_path, tool, mode):
    out = tmp_path / "out"
    if mode == "custom":
        export_custom(make_run(), out)
    else:
        export_long(make_run(), out, dev_flag=mode == "long_dev")
    result = tool(out)
    assert result.returncode == 0, result.stderr
    files = sorted(out.glob("results/*/*_eval_results.json"))
    dimensions = CUSTOM_DIMENSIONS if mode == "custom" else LONG_DIMENSIONS
    assert {path.parent.name for path in files} == set(dimensions)
    seen = json.loads((out / "results" / dimensions[0] / "seen.json").read_text())
    assert seen["dev_flag"] is (mode == "long_dev")
    assert seen["mode"] == ("custom_input" if mode == "custom" else "long_custom_input")
    folder = {"custom": "vbench/", "long": "vbench/long/", "long_dev": "vbench/long_dev/"}[mode]
    imported = import_results(files)
    assert imported[f"{folder}subject_consistency"].official_score == (0.7 if mode == "long_dev" else 0.5)
    assert imported[f"vbench/{'' if mode == 'custom' else 'long/'}imaging_quality"].entries[0].value == 50.0
    assert len(imported) == len(dimensions)
    assert imported[f"{folder}subject_consistency"].commit == "unknown"  # the stand-in is no checkout
    again = tool(out)
    assert again.returncode == 2 and "scored before" in again.stderr


def test_the_script_refuses_paths_that_a_shell_would_read(make_run, tmp_path, tool):
    out = tmp_path / "it's here"
    export_custom(make_run(), out)
    result = tool(out)
    assert result.returncode == 2 and "move this folder" in result.stderr
    plain = tmp_path / "plain"
    export_custom(make_run(), plain)
    assert "set VBENCH_HOME" in tool(plain, VBENCH_HOME="").stderr


def test_standard_names_videos_by_prompt_in_the_folders_of_their_dimensions(make_run, tmp_path, tool):
    run = make_run(seeds=5)
    info = _full_info(tmp_path / "VBench_full_info.json")
    out = tmp_path / "out"
    export = export_standard(run, out, full_info=info, dimensions=["subject_consistency", "dynamic_degree"])
    assert sorted(export.files) == sorted(
        f"subject_consistency/prompt {p}-{s}.mp4" for p in range(3) for s in range(5)
    )
    assert (out / "videos/subject_consistency/prompt 2-4.mp4").read_bytes() == b"video 2 4"
    result = tool(out)
    assert result.returncode == 0, result.stderr
    seen = json.loads((out / "results/dynamic_degree/seen.json").read_text())
    assert seen["videos_path"].endswith("videos/subject_consistency") and seen["mode"] == "vbench_standard"
    assert import_results(sorted(out.glob("results/*/*_eval_results.json")))["vbench/dynamic_degree"].entries


def test_standard_counts_what_is_missing_and_may_be_told_to_go_on(make_run, tmp_path):
    run, info = make_run(seeds=4), _full_info(tmp_path / "VBench_full_info.json")
    with pytest.raises(ValueError, match=r"3 videos of dynamic_degree.* e\.g\. 'prompt 0-4\.mp4'"):
        export_standard(run, tmp_path / "out", full_info=info, dimensions=["dynamic_degree"])
    assert not (tmp_path / "out").exists()
    export = export_standard(run, tmp_path / "out", full_info=info, dimensions=["dynamic_degree"], allow_missing=True)
    assert any("3 videos are missing" in note for note in export.notes)
    # All sixteen dimensions: the other three prompts, and the one of the scenes.
    with pytest.raises(ValueError, match=r"20 videos of subject_consistency"):
        export_standard(
            make_run(prompts=1, seeds=5), tmp_path / "all", full_info=_full_info(tmp_path / "four.json", num=4)
        )


def test_standard_refuses_other_prompts_names_too_long_and_no_list(make_run, tmp_path):
    info = _full_info(tmp_path / "VBench_full_info.json")
    with pytest.raises(ValueError, match="give the path of VBench_full_info.json"):
        export_standard(make_run(), tmp_path / "out")
    with pytest.raises(ValueError, match="1 prompts of the run are not in VBench_full_info.json, e.g. 'prompt 3'"):
        export_standard(make_run(prompts=4), tmp_path / "out", full_info=info)
    text = "é" * 125 + "{}"  # 251 bytes, and "-0.mp4" makes 257
    long_info = _full_info(tmp_path / "long.json", text=text)
    with pytest.raises(ValueError, match="at most 255 bytes"):
        export_standard(make_run(text=text), tmp_path / "out", full_info=long_info, dimensions=["dynamic_degree"])
    (tmp_path / "bad.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="cannot read VBench's list"):
        export_standard(make_run(), tmp_path / "out", full_info=tmp_path / "bad.json")


def test_a_used_folder_is_refused_and_an_empty_one_is_taken(make_run, tmp_path):
    run, out = make_run(), tmp_path / "out"
    out.mkdir()
    export_long(run, out)
    with pytest.raises(ValueError, match="is not empty"):
        export_long(run, out)


@pytest.mark.parametrize(
    ("change", "call", "message"),
    [
        ({}, lambda r, o: export_custom(r, o, dimensions=["color"]), "'color' is not scored in mode custom"),
        ({}, lambda r, o: export_custom(r, o, dimensions=["dynamic"]), "Did you mean 'dynamic_degree'"),
        ({}, lambda r, o: export_custom(r, o, dimensions=[]), "name one or more"),
        ({}, lambda r, o: export_long(r, o, dimensions=["temporal_flickering"]), "not scored in mode long"),
        ({"text": ""}, export_custom, "'p0000-0' has no prompt, and overall_consistency reads it"),
        ({"prompts": 0}, export_custom, "has no videos"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(make_run, tmp_path, change, call, message):
    with pytest.raises(ValueError, match=message):
        call(make_run(**change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_videos_must_be_there_and_have_places_of_their_own(make_run, tmp_path):
    run = make_run()
    (run / "videos" / "p0001-1.mp4").unlink()
    with pytest.raises(ValueError, match="'p0001-1' at .* is no .mp4 file"):
        export_custom(run, tmp_path / "out")
    run = make_run()
    lines = read_manifest(run / "manifest.jsonl")
    write_manifest(run / "manifest.jsonl", [lines[0], replace(lines[1], seed_index=0)])
    with pytest.raises(ValueError, match="'p0000-0' and 'p0000-1' have the same prompt and seed index"):
        export_custom(run, tmp_path / "out")


def test_lossy_videos_and_copies_are_noted(make_run, tmp_path, monkeypatch):
    assert any("crf 23" in note for note in export_long(make_run(crf=23), tmp_path / "a").notes)
    assert any("does not say" in note for note in export_long(make_run(crf=None), tmp_path / "b").notes)

    def refuse(source, target):
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", refuse)
    export = export_long(make_run(), tmp_path / "c")
    assert any("6 of 6 videos are copies" in note for note in export.notes)
    assert (tmp_path / "c" / "videos" / "p0000-0.mp4").read_bytes() == b"video 0 0"
    # An export that fails half-way leaves nothing.
    monkeypatch.setattr(shutil, "copy2", refuse)
    with pytest.raises(OSError, match="another disk"):
        export_long(make_run(), tmp_path / "d")
    assert not [path for path in tmp_path.iterdir() if path.name.strip(".").startswith("d")]
