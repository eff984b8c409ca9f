"""Which frames are looked at: VBench's own indices, and rules that hold for every length."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.evaluation.preprocessing import clip_ranges, middle, stride_for_8fps

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "vbench" / "golden.json"
COUNTS = st.integers(1, 4000)
exact = settings(deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


def test_middle_frames_are_vbenchs(golden):
    for key, expected in golden["get_frame_indices_middle"].items():
        num_samples, num_frames = (int(part.split("=")[1]) for part in key.split(","))
        assert middle(num_samples, num_frames) == expected, key


def test_clips_are_vbench_longs(golden):
    facts = {name: (entry["shape"][0], entry["fps"]) for name, entry in golden["videos"].items()}
    # Two of the split videos have no other golden numbers.
    facts |= {"drift": (160, 16), "fast_squares_24": (48, 24)}
    for name, clips in golden["split_video_into_clips_2s [start_frame, n_frames]"].items():
        assert clip_ranges(*facts[name]) == [tuple(clip) for clip in clips.values()], name


@exact
@given(COUNTS, st.sampled_from([1, 8, 12.5, 16, 23.976, 24, 29.97, 30, 60]), st.sampled_from([1, 2, 10]))
def test_clips_cover_every_frame_at_one_length(num_frames, fps, seconds):
    clips = clip_ranges(num_frames, fps, seconds)
    covered = {frame for start, length in clips for frame in range(start, start + length)}
    assert covered == set(range(num_frames))
    assert {length for _, length in clips} == {min(num_frames, int(fps) * seconds)}
    assert [start for start, _ in clips] == sorted({start for start, _ in clips})
    # The borrowed clip is the last one only.
    assert all(start == index * int(fps) * seconds for index, (start, _) in enumerate(clips[:-1]))


@exact
@given(st.integers(1, 32), COUNTS)
def test_middle_is_the_middle_of_equal_stretches(num_samples, num_frames):
    count = min(num_samples, num_frames)
    # Rounded as numpy rounds it, which is what VBench cuts at: 117 may come out as 116.99.
    edges = [int(part * (num_frames / count)) for part in range(count)] + [num_frames]
    expected = [(edges[i] + edges[i + 1] - 1) // 2 for i in range(count)]
    assert middle(num_samples, num_frames) == expected + [expected[-1]] * (num_samples - count)


def test_a_half_stride_goes_to_the_even_neighbour():
    fps = [1, 8, 11, 12, 16, 20, 24, 25, 28, 30, 60]
    strides = [stride_for_8fps(rate) for rate in fps]
    assert strides == [1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 8]
    # Rounding halves up is the mistake to make here.
    assert strides != [max(1, int(rate / 8 + 0.5)) for rate in fps]
