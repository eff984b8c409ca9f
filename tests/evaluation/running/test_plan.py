"""Plans: every video once, in units that the protocol alone decides; folders of videos and their prompts."""

import json
from pathlib import Path

import pytest
from clips import write_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from longtake.evaluation.records import ManifestLine, score_name, write_json, write_manifest
from longtake.evaluation.running.plan import Unit, interleaved, plan_generation, plan_videos, prompt_of_name
from longtake.evaluation.running.protocol import Protocol
from longtake.evaluation.running.runner import Evaluation
from longtake.evaluation.running.suites import Change, Prompt

CACHES = {"full": {"policy": "full"}, "pack": {"policy": "pack"}, "other": {"policy": "pack"}}


def make_protocol(**settings):
    return Protocol(**{"caches": CACHES, "family": "mini", "model_sha256": "0" * 64, "seconds": 30.0} | settings)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    num_prompts=st.integers(1, 7),
    samples=st.integers(1, 3),
    batch=st.integers(1, 5),
    world=st.integers(1, 4),
    changing=st.sets(st.integers(0, 6)),
)
def test_every_video_falls_to_one_process_whatever_their_number(num_prompts, samples, batch, world, changing):
    change = (Change(start_s=10.0, text="later"),)
    prompts = [Prompt(text=f"p{i}", changes=change if i in changing else ()) for i in range(num_prompts)]
    runs = plan_generation(make_protocol(samples=samples, batch=batch), prompts, Path("out"))
    units = interleaved(runs)
    taken = [unit for rank in range(world) for unit in units if unit.share % world == rank]
    videos = [(unit.label, line.prompt_index, line.seed_index) for unit in taken for line in unit.lines]
    assert sorted(videos) == sorted((c, p, s) for c in CACHES for p in range(num_prompts) for s in range(samples))
    for unit in units:
        assert 1 <= len(unit.lines) <= batch
        # One schedule for all that are made together.
        assert len({tuple(change.start_s for change in prompt.changes) for prompt in unit.prompts}) == 1
    for number in {unit.number for unit in units}:
        same = [[line.id for line in unit.lines] for unit in units if unit.number == number]
        assert same == [same[0]] * len(CACHES)


def test_what_is_known_before_a_video_is_made():
    own = ("scene", "background_consistency")
    change = Change(start_s=10.0, text="c")
    prompts = [Prompt(text="a", extended="a, longer", dimensions=own), Prompt(text="b", changes=(change,))]
    run = plan_generation(make_protocol(samples=2), prompts, Path("out"))[0]
    lines = {line.id: line for unit in run.units for line in unit.lines}
    assert set(lines) == {"p0000-0", "p0000-1", "p0001-0", "p0001-1"}
    assert lines["p0000-1"].seed == 1_000_003 and lines["p0001-0"].seed == 1
    assert lines["p0000-0"].prompt_extended == "a, longer" and lines["p0000-0"].policy == "full"
    assert lines["p0000-0"].file == "videos/p0000-0.mp4"
    assert [(s.start_s, s.end_s, s.prompt) for s in lines["p0001-0"].segments] == [(0, 10, "b"), (10, 30, "c")]
    hashes = {unit.lines[0].config_hash for unit in run.units}
    assert len(hashes) == 1
    # Prompts of VBench's list bring their dimensions.
    line = lines["p0000-0"]
    assert line.dimensions == own and ManifestLine.from_json(json.loads(json.dumps(line.to_json()))) == line
    assert "dimensions" not in lines["p0001-0"].to_json()


def test_a_unit_is_done_when_these_very_videos_are_measured(tmp_path):
    planned = ManifestLine(id="p0000-0", file="videos/p0000-0.mp4", prompt="a")
    unit = Unit(label="x", number=0, share=0, folder=tmp_path, lines=(planned,), prompts=(Prompt(text="a"),))
    assert not unit.is_done(keep_videos=False) and unit.finished_lines() == ()
    made = ManifestLine(id="p0000-0", file="videos/p0000-0.mp4", prompt="a", num_frames=5, chunk_starts=(0, 3))
    write_json(unit.record_path, {"lines": [made.to_json()], "costs": {"kv_mb": 1.0}})
    assert unit.finished_lines() == (made,)
    assert not unit.is_done(keep_videos=False)
    write_json(unit.score_path(made), {"schema": 1, "video": made.to_json() | {"sha256": "other"}, "scores": {}})
    assert not unit.is_done(keep_videos=False)
    write_json(unit.score_path(made), {"schema": 1, "video": made.to_json(), "scores": {}})
    assert unit.is_done(keep_videos=False) and not unit.is_done(keep_videos=True)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "p0000-0.mp4").write_bytes(b"x")
    assert unit.is_done(keep_videos=True)
    unit.score_path(made).write_text("{")
    with pytest.raises(ValueError, match="is no JSON.*delete it"):
        unit.is_done(keep_videos=True)


def test_prompts_of_names_by_vbenchs_rule():
    names = {"a cat-3": ("a cat", 3), "a well-known cat": ("a well-known cat", 0), "a cat-12-0": ("a cat-12", 0)}
    assert {name: prompt_of_name(name) for name in names} == names and prompt_of_name("-5") == ("", 5)


def test_one_folder_is_one_run_with_prompts_from_its_names(tmp_path):
    for name in ("a cat-1", "a cat-0", "a dog-0"):
        write_clip(tmp_path / "clips" / f"{name}.mp4")
    (run,) = plan_videos(tmp_path / "clips", tmp_path / "out")
    assert run.label == "clips" and run.folder == tmp_path / "out"
    lines = [unit.lines[0] for unit in run.units]
    assert [(line.id, line.prompt, line.prompt_index, line.seed_index) for line in lines] == [
        ("a cat-0", "a cat", 0, 0),
        ("a cat-1", "a cat", 0, 1),
        ("a dog-0", "a dog", 1, 0),
    ]
    first = lines[0]
    assert (first.num_frames, first.fps, first.height, first.width) == (5, 8, 32, 32)
    assert (run.folder / first.file).resolve() == tmp_path / "clips" / "a cat-0.mp4" and len(first.sha256) == 64
    assert not any(unit.is_generated for unit in run.units)


def test_folders_of_policies_are_runs_with_the_same_prompt_numbers(tmp_path):
    for name in ("full/b-0", "full/a-0", "pack/a-0", "pack/b-0", "pack/c-0"):
        write_clip(tmp_path / f"{name}.mp4")
    runs = plan_videos(tmp_path, tmp_path / "out")
    assert [(run.label, run.folder) for run in runs] == [(n, tmp_path / "out" / n) for n in ("full", "pack")]
    numbers = [{unit.lines[0].prompt: unit.lines[0].prompt_index for unit in run.units} for run in runs]
    assert numbers == [{"a": 0, "b": 1}, {"a": 0, "b": 1, "c": 2}]


def test_folders_without_videos_or_with_one_label_are_refused(tmp_path):
    for name in ("two/my run/a-0", "two/my-run/a-0"):
        write_clip(tmp_path / f"{name}.mp4")
    (tmp_path / "empty").mkdir()
    refused = {"two": "would have the same label", "none": "no folder of videos", "empty": "holds no videos"}
    for name, message in refused.items():
        with pytest.raises(ValueError, match=message):
            plan_videos(tmp_path / name, tmp_path / "out")


def test_a_manifest_comes_first_then_a_file_of_prompts(tmp_path):
    clips = tmp_path / "clips"
    for name in ("one", "two"):
        write_clip(clips / "videos" / f"{name}.mp4")
    lines = [
        ManifestLine(
            id=f"p000{i}-0", file=f"videos/{name}.mp4", prompt=name, prompt_index=i, seed=7, chunk_starts=(0, 3)
        )
        for i, name in enumerate(("one", "two"))
    ]
    write_manifest(clips / "manifest.jsonl", lines)
    (run,) = plan_videos(clips, tmp_path / "out")
    assert [unit.lines[0].id for unit in run.units] == ["p0000-0", "p0001-0"]
    assert run.units[1].lines[0].chunk_starts == (0, 3) and run.units[1].lines[0].seed == 7
    texts = {"one.mp4": "a text", "two.mp4": "another"}
    (tmp_path / "prompts.json").write_text(json.dumps(texts))
    (run,) = plan_videos(clips / "videos", tmp_path / "out", prompt_file=tmp_path / "prompts.json")
    assert [unit.lines[0].prompt for unit in run.units] == ["a text", "another"]
    (run,) = plan_videos(clips / "videos", tmp_path / "out", manifest=clips / "manifest.jsonl")
    assert [unit.lines[0].prompt for unit in run.units] == ["one", "two"]
    # Prompts beside the videos are found, with and without endings.
    for name, texts in (
        ("prompts.json", {"one": "a", "two": "b"}),
        ("prompt_file.json", {"one.mp4": "c", "two": "d"}),
    ):
        (clips / "videos" / name).write_text(json.dumps(texts))
        (run,) = plan_videos(clips / "videos", tmp_path / "out")
        assert [unit.lines[0].prompt for unit in run.units] == list(texts.values())


def test_folders_of_frames_are_videos(tmp_path):
    for number in range(3):
        path = tmp_path / "clips" / "a cat-0" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number, 0, 0)).save(path)
    (run,) = plan_videos(tmp_path / "clips", tmp_path / "out", fps=8)
    line = run.units[0].lines[0]
    assert (line.id, line.prompt, line.num_frames, line.fps) == ("a cat-0", "a cat", 3, 8)
    with pytest.raises(ValueError, match="fps"):
        plan_videos(tmp_path / "clips", tmp_path / "out")


@pytest.mark.parametrize(
    ("prompts", "manifest", "message"),
    [
        ('{"one.mp4": "a"}', None, "has none for two.mp4"),
        (
            '{"one.mp4": "a", "two.mp4": "b", "six.mp4": "c"}',
            None,
            "prompts for 1 videos that are not there, the first is 'six.mp4'",
        ),
        ("[", None, "cannot read"),
        ("[]", None, "must be a JSON mapping"),
        ('{"a": 1}', None, "must be a JSON mapping"),
        (None, "one", "no line for 1 videos of .*clips, the first is two.mp4"),
        (None, "six", "names 1 videos that are not there"),
        ("{}", "one", "give one of the two"),
    ],
)
def test_videos_and_prompts_that_do_not_match_are_refused(tmp_path, prompts, manifest, message):
    clips, paths = tmp_path / "clips", {}
    for name in ("one", "two"):
        write_clip(clips / f"{name}.mp4")
    if prompts is not None:
        paths["prompt_file"] = tmp_path / "prompts.json"
        paths["prompt_file"].write_text(prompts)
    if manifest is not None:
        paths["manifest"] = tmp_path / "list.jsonl"
        write_manifest(paths["manifest"], [ManifestLine(id=manifest, file=f"clips/{manifest}.mp4")])
    with pytest.raises(ValueError, match=message):
        plan_videos(clips, tmp_path / "out", **paths)


def test_a_manifest_in_the_words_of_others_is_understood(tmp_path):
    write_clip(tmp_path / "clips" / "one-0.mp4")
    words = {"id": "one-0", "prompt": "a cat", "n_frames": 5, "fps": 8, "H": 32, "W": 32, "policy": "pack"}
    manifest = tmp_path / "clips" / "manifest.jsonl"
    manifest.write_text(json.dumps(words))
    (run,) = plan_videos(tmp_path / "clips", tmp_path / "out")
    line = run.units[0].lines[0]
    assert (line.id, line.prompt, line.num_frames, line.height, line.policy) == ("one-0", "a cat", 5, 32, "pack")
    assert line.file == "../clips/one-0.mp4" and line.encoder == {"codec": "h264", "pixels": "yuv420p"}
    manifest.write_text(json.dumps(words | {"id": "two-0"}))
    with pytest.raises(ValueError, match="'two-0' has no 'file', and .*clips no video of that name"):
        plan_videos(tmp_path / "clips", tmp_path / "out")


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=251))
def test_scores_of_any_name_have_a_file(name):
    own = score_name(name)
    assert len(own.encode()) <= 255 and own.endswith(".json")
    assert own == f"{name}.json" or len(name.encode()) > 250
    assert len({score_name("猫" * 82 + end) for end in "abc"}) == 3


def test_the_longest_name_is_written(tmp_path):
    """Its temporary file, too."""
    write_json(tmp_path / score_name("猫" * 82 + "-0"), {})
    assert len(list(tmp_path.iterdir())) == 1


def test_a_run_has_one_frame_rate_and_readable_videos(tmp_path):
    write_clip(tmp_path / "clips" / "one.mp4", fps=8)
    write_clip(tmp_path / "clips" / "two.mp4", fps=16)
    with pytest.raises(ValueError, match="mixes frame rates: one has 8 frames per second, two 16"):
        plan_videos(tmp_path / "clips", tmp_path / "out")

    def rates(**settings):
        protocol = Protocol(videos=str(tmp_path / "clips"), **settings)
        return [unit.lines[0].fps for unit in Evaluation(protocol, tmp_path / "out").units]

    (tmp_path / "mine.py").write_text("x = 1")
    # VBench takes every clip at its own rate, so with its networks they may differ.
    given = {"backbones": str(tmp_path / "mine.py")}
    assert rates(mixed_rates=True) == rates(**given) == [8, 16]
    for refused in ({}, {"mixed_rates": False, **given}):
        with pytest.raises(ValueError, match="mixes frame rates"):
            rates(**refused)
    (tmp_path / "clips" / "two.mp4").write_bytes(b"no video at all")
    with pytest.raises(ValueError, match="two.mp4"):
        plan_videos(tmp_path / "clips", tmp_path / "out")
