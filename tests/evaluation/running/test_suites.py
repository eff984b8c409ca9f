"""Lists of prompts: every format, twins, segments, and what is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.evaluation.mini_world.scenes import parse_caption
from longtake.evaluation.running.suites import _SEED_STEP, Change, Prompt, load_prompts, prompts_sha256, video_seed


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_bundled_suite_is_held_back_scenes_and_grows_at_its_end():
    few, more = load_prompts("suite:moving_scenes", count=2), load_prompts("suite:moving_scenes", count=5)
    assert more[:2] == few and len(more) == 5 and len({prompt.text for prompt in more}) == 5
    assert all(parse_caption(prompt.text) for prompt in more)
    # The study's own scenes: results of one are results on the same prompts as the other's.
    assert few[0].text == "a white triangle swaying slowly over a grey striped background"
    assert len(load_prompts("suite:moving_scenes")) == 16


def test_text_files_twins_and_the_first_n(tmp_path):
    source = write(tmp_path / "movie.txt", "first one\n\n# a remark\nsecond: with, commas\nthird ünï\n")
    twin = write(tmp_path / "long.txt", "the first, longer\nthe second, longer\nthe third, longer\n")
    prompts = load_prompts(source, extended=twin, count=2)
    assert prompts == [
        Prompt(text="first one", extended="the first, longer"),
        Prompt(text="second: with, commas", extended="the second, longer"),
    ]
    assert [prompt.generated_from for prompt in prompts] == ["the first, longer", "the second, longer"]
    assert load_prompts(source)[2].generated_from == "third ünï"
    short = write(tmp_path / "short.txt", "only one\n")
    with pytest.raises(ValueError, match="has 1 extended prompts for the 3 of .*movie.txt"):
        load_prompts(source, extended=short)
    with pytest.raises(ValueError, match="num_prompts=4: .* has prompts for 3 videos only"):
        load_prompts(source, count=4)


def test_vbench_lists_know_their_dimensions(tmp_path):
    rows = [
        {"prompt_en": "a person is swimming", "dimension": ["human_action"], "auxiliary_info": {"x": 1}},
        {"prompt_en": "a cat", "dimension": ["subject_consistency", "motion_smoothness"]},
    ]
    source = write(tmp_path / "VBench_full_info.json", json.dumps(rows))
    assert [prompt.text for prompt in load_prompts(source)] == ["a person is swimming", "a cat"]
    (chosen,) = load_prompts(source, dimensions=["motion_smoothness"])
    assert chosen == Prompt(text="a cat", dimensions=("subject_consistency", "motion_smoothness"))
    with pytest.raises(ValueError, match="unknown dimension 'colour'.*human_action"):
        load_prompts(source, dimensions=["colour"])
    with pytest.raises(ValueError, match="name no dimensions"):
        load_prompts(write(tmp_path / "a.txt", "a\n"), dimensions=["human_action"])


def test_json_lines_and_their_segments(tmp_path):
    row = {
        "prompt": "a",
        "prompt_extended": "a, longer",
        "segments": [{"start_s": 5, "prompt": "b"}, {"start_s": 7.5, "prompt": "c", "prompt_extended": "c, longer"}],
    }
    source = write(tmp_path / "list.jsonl", json.dumps(row) + "\n\n" + json.dumps({"prompt": "d"}) + "\n")
    first, second = load_prompts(source)
    assert second == Prompt(text="d")
    assert first.changes == (Change(start_s=5.0, text="b"), Change(start_s=7.5, text="c", extended="c, longer"))
    assert [change.generated_from for change in first.changes] == ["b", "c, longer"]
    with pytest.raises(ValueError, match="segments of their own already"):
        load_prompts(source, segment_seconds=5, seconds=10)


def test_prompts_in_groups_are_the_segments_of_one_video(tmp_path):
    source = write(tmp_path / "six.txt", "a\nb\nc\nd\ne\nf\n")
    first, second = load_prompts(source, segment_seconds=10, seconds=25)
    assert (first.text, second.text) == ("a", "d")
    assert first.changes == (Change(start_s=10.0, text="b"), Change(start_s=20.0, text="c"))
    assert len(load_prompts("suite:moving_scenes", count=3, segment_seconds=10, seconds=60)) == 3
    with pytest.raises(ValueError, match="6 prompts do not make whole videos of 4 segments: give a multiple of 4"):
        load_prompts(source, segment_seconds=10, seconds=40)
    with pytest.raises(ValueError, match="does not divide a video of 10 s"):
        load_prompts(source, segment_seconds=10, seconds=10)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{}", "a list of prompts is needed"),
        ("a.json", "nonsense", "is no JSON"),
        ("a.json", "[3]", "entry 1: 3 is no prompt"),
        ("a.jsonl", '{"prompt": "a"}\n{"promt": "b"}', "line 2: unknown key 'promt'.*Did you mean 'prompt'"),
        ("a.jsonl", "{", "line 1 is no JSON"),
        ("a.jsonl", '{"prompt_extended": "a"}', "lacks the key 'prompt'"),
        ("a.jsonl", '{"prompt": "a", "segments": [{"prompt": "b"}]}', "segments need start_s"),
        ("a.jsonl", '{"prompt": "a", "segments": [{"prompt": "b", "start_s": 0}]}', "rising, different times above 0"),
        ("a.jsonl", '{"prompt": " "}', "prompt 1: the prompt is empty"),
        ("a.txt", "\n# nothing\n", "holds no prompts"),
    ],
)
def test_bad_lists_are_named(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(write(tmp_path / name, text))


def test_unknown_places_are_named(tmp_path):
    with pytest.raises(ValueError, match="unknown suite of prompts 'moving_scene'.*Did you mean 'moving_scenes'"):
        load_prompts("suite:moving_scene")
    with pytest.raises(ValueError, match="cannot read the prompts .*none.txt.*suite:moving_scenes"):
        load_prompts(str(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match="num_prompts=0"):
        load_prompts("suite:moving_scenes", count=0)


def test_the_hash_is_of_everything_that_is_said():
    base = Prompt(text="a", changes=(Change(start_s=1.0, text="b"),))
    others = [
        Prompt(text="b", changes=base.changes),
        Prompt(text="a", extended="c", changes=base.changes),
        Prompt(text="a", changes=(Change(start_s=2.0, text="b"),)),
        Prompt(text="a", changes=(Change(start_s=1.0, text="b", extended="c"),)),
        Prompt(text="a"),
    ]
    hashes = {prompts_sha256([prompt]) for prompt in (base, *others)}
    assert len(hashes) == len(others) + 1
    assert prompts_sha256([base, others[0]]) != prompts_sha256([others[0], base])


VIDEOS = st.tuples(st.integers(0, _SEED_STEP - 1), st.integers(0, 99))


@settings(deadline=None, derandomize=True)
@given(VIDEOS, VIDEOS)
def test_no_two_videos_share_a_seed(one, other):
    assert (video_seed(*one) == video_seed(*other)) == (one == other)
