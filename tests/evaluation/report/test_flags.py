"""Six faults, with and without grain: each raises its own flag and no other; a healthy video raises none."""

import numpy as np
import pytest

from longtake.evaluation.metric import Score, VideoInfo
from longtake.evaluation.metrics import COURSE, course
from longtake.evaluation.metrics.course import TrackMetric
from longtake.evaluation.records import ManifestLine, VideoScores
from longtake.evaluation.report.data import KINDS, _find_flags
from longtake.evaluation.video import VideoSource
from longtake.pipelines.video_file import VideoFormat, VideoWriter

FPS = 16
SIZE = (72, 96)
SECONDS = 8
GRAIN = {"clean": 0.0, "grainy": 5.0, "very grainy": 10.0}
FAULTS = ("static", "frozen_tail", "loop", "cut", "colour_drift", "flicker")


def background(seed, size=SIZE):
    """Waves of every direction in three colours, under fine grit."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]] / np.array(size)[:, None, None]
    picture = np.empty((*size, 3))
    for channel in range(3):
        picture[..., channel] = rng.uniform(80, 130)
        for _ in range(6):
            down, right = rng.uniform(-4, 4, 2)
            wave = np.cos(2 * np.pi * (down * rows + right * columns) + rng.uniform(0, 6.28))
            picture[..., channel] += rng.uniform(3, 14) * wave
    return picture + rng.normal(0, 6, (*size, 1))


def moving_shapes(seed=0, seconds=SECONDS, fps=FPS, size=SIZE):
    """Three discs that cross a textured background on straight lines and bounce off its edges."""
    rng = np.random.default_rng(100 + seed)
    still, (rows, columns) = background(seed, size), np.mgrid[: size[0], : size[1]]
    frames = np.repeat(still[None], round(seconds * fps), axis=0)
    places = []
    for _ in range(3):
        colour, radius, start = rng.uniform(0, 255, 3), size[0] * rng.uniform(0.09, 0.16), rng.uniform(0.2, 0.8, 2)
        places.append((colour, radius, start, rng.uniform(0.13, 0.4, 2) * rng.choice([-1, 1], 2)))
    for index, frame in enumerate(frames):
        for colour, radius, start, speed in places:
            place = np.abs((start + speed * index / fps + 1) % 2 - 1)
            y, x = radius + place * (np.array(size) - 2 * radius)
            frame[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = colour
    return frames


def static(frames, seed=0):
    return np.repeat(frames[:1], len(frames), axis=0)


def frozen_tail(frames, seed=0, share=0.3):
    first = int(len(frames) * (1 - share))
    return frames[np.minimum(np.arange(len(frames)), first)]


def loop(frames, seed=0, period=41):
    return frames[np.arange(len(frames)) % period]


def cut(frames, seed=0):
    half = len(frames) // 2
    other = moving_shapes(seed=seed + 50, seconds=len(frames) / FPS, size=frames.shape[1:3])
    return np.concatenate([frames[:half], other[half:]])


def colour_drift(frames, seed=0):
    return frames + np.linspace(0, 1, len(frames))[:, None, None, None] * np.array((30, 0, -15))


def flickering(frames, seed=0):
    return frames + 5.0 * np.sin(2 * np.pi * 3.1 * np.arange(len(frames)) / FPS)[:, None, None, None]


MAKE = dict(zip(FAULTS, (static, frozen_tail, loop, cut, colour_drift, flickering), strict=True))


def make(fault, seed=0, **options):
    frames = moving_shapes(seed=seed, **options)
    return MAKE[fault](frames, seed=seed) if fault else frames


def to_video(frames, sigma=0.0, seed=7):
    grain = np.random.default_rng(seed).normal(0, sigma, frames.shape) if sigma else 0.0
    return np.clip(np.rint(frames + grain), 0, 255).astype(np.uint8)


def measured(video, fps=FPS, measures=COURSE, **facts):
    info = VideoInfo(id="v", num_frames=len(video), fps=fps, height=video.shape[1], width=video.shape[2], **facts)
    meter = TrackMetric(measures).start(info)
    for start in range(0, len(video), 16):
        meter.push(video[start : start + 16])
    return meter.finish()


def kinds(video, **options):
    return {flag.kind for flag in _find_flags(measured(video, **options))}


@pytest.mark.parametrize("sigma", GRAIN.values(), ids=GRAIN)
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_raises_its_flag_and_no_other(fault, sigma):
    assert kinds(to_video(make(fault), sigma)) == {fault}


@pytest.mark.parametrize("sigma", GRAIN.values(), ids=GRAIN)
@pytest.mark.parametrize("seed", range(3))
def test_healthy_video_raises_none(seed, sigma):
    assert kinds(to_video(moving_shapes(seed=seed), sigma)) == set()


@pytest.mark.parametrize("fault", FAULTS)
def test_small_and_longer_videos(fault):
    """The mini model's size, another scene, and longer."""
    assert kinds(to_video(make(fault, seed=3, size=(64, 64), seconds=20), 4.0)) == {fault}


@pytest.mark.parametrize("crf", [23, 32])
@pytest.mark.parametrize("fault", [*FAULTS, None])
def test_after_a_lossy_codec(fault, crf, tmp_path):
    """Keyframes that differ from their neighbours, and a still picture that is refined for a second."""
    path = tmp_path / "video.mp4"
    with VideoWriter(path, video_format=VideoFormat(height=64, width=64, crf=crf, threads=1)) as writer:
        writer.write(to_video(make(fault, seed=1, size=(64, 64)), 3.0))
    video = np.concatenate(list(VideoSource.open(path).pieces()))
    assert kinds(video) == ({fault} if fault else set())


@pytest.mark.parametrize("fps", [8, 24])
def test_other_frame_rates(fps):
    frames = moving_shapes(fps=fps)
    assert kinds(to_video(frames), fps=fps) == set()
    frames[-2 * fps :] = frames[-2 * fps]
    assert kinds(to_video(frames), fps=fps) == {"frozen_tail"}


def test_times_are_those_of_the_fault():
    def only(video):
        (flag,) = _find_flags(measured(to_video(video)))
        return flag

    frozen = only(frozen_tail(moving_shapes(), share=0.25))
    assert frozen.start_s == pytest.approx(6.0, abs=0.1) and frozen.end_s == pytest.approx(8.0)
    assert only(make("cut")).start_s == pytest.approx(4.0)
    half = np.concatenate([moving_shapes(seconds=6), moving_shapes(seconds=14)[96 + np.arange(128) % 32]])
    again = only(half)
    assert again.kind == "loop" and "2.00 s" in again.message
    assert again.start_s == pytest.approx(6.0, abs=1.0) and again.end_s == pytest.approx(14.0, abs=0.1)
    late = moving_shapes()
    late[80:] += 12 * (-1.0) ** np.arange(48)[:, None, None, None]
    assert only(late).kind == "flicker" and only(late).start_s >= 4.0


def test_no_motion_is_not_flicker_nor_drift():
    """An object of half the frame that grows and shrinks moves the mean brightness, not most of the picture."""
    rows, columns = np.mgrid[:64, :64] - 31.5
    radius = 14 + 6 * np.sin(2 * np.pi * np.arange(8 * FPS) / FPS)
    frames = np.where((rows**2 + columns**2)[None] < radius[:, None, None] ** 2, 230.0, 40.0)
    scores = measured(to_video(np.repeat(frames[..., None], 3, axis=3)))
    assert not {"flicker", "colour_drift", "cut"} & {flag.kind for flag in _find_flags(scores)}
    means = frames.mean(axis=(1, 2))
    # What a measure of the mean brightness alone would say.
    assert np.abs(means - np.convolve(means, np.ones(9) / 9, mode="same"))[8:-8].mean() > 1.0


def test_flashes_and_jumping_objects_are_no_cuts():
    frames = moving_shapes()
    frames[50] = 250
    frames[90:] = moving_shapes(seconds=12)[90 + 40 : 90 + 40 + 38]
    assert "cut" not in kinds(to_video(frames))
    with_cut = np.concatenate(
        [moving_shapes(seconds=2), moving_shapes(seed=9, seconds=3), background(5)[None] * 0 + 30]
    )
    video = to_video(np.concatenate([with_cut, np.repeat(with_cut[-1:], 30, axis=0)]))
    assert measured(video, measures=(course.SHOTS,))["proxy/cuts"].details["frames"] == [32, 80]


def test_cut_of_light_alone_is_a_cut_and_flicker_of_the_same_size_is_not():
    frames = moving_shapes()
    lit = frames.copy()
    lit[64:] += 60
    assert kinds(to_video(lit)) == {"cut"}
    pulses = frames + 60.0 * (np.arange(len(frames)) // 3 % 2)[:, None, None, None]
    assert kinds(to_video(pulses)) == {"flicker"}


def test_loop_that_begins_again_with_a_jump_is_not_full_of_cuts():
    """Everything moves, so that the jump back looks like another scene."""
    wide = background(4, (72, 600))
    pan = np.stack([wide[:, 3 * index : 3 * index + 96] for index in range(160)])
    video = to_video(pan[np.arange(160) % 48 + 60])
    assert measured(video)["proxy/cuts"].value == 3
    assert kinds(video) == {"loop"}


def test_periodic_scene_of_the_bundled_world_is_no_loop():
    scores = measured(to_video(loop(moving_shapes(), period=32)))
    (flag,) = _find_flags(scores)
    assert flag.kind == "loop"
    judged = Score(value=1.0, details={"scene_periods_s": [2.0, 4.5]})
    assert _find_flags({**scores, "judge/motion_magnitude": judged}) == []
    other = Score(value=1.0, details={"scene_periods_s": [4.5]})
    assert _find_flags({**scores, "judge/motion_magnitude": other}) == [flag]


def test_rests_are_no_frozen_tail():
    """Something stops every two seconds for as long; that it rests when the video ends says nothing."""
    index = np.arange(10 * FPS)
    moving = moving_shapes(seconds=10)
    stop_and_go = moving[np.minimum(index % 64, 32) + index // 64 * 32]
    assert kinds(to_video(stop_and_go[: 9 * FPS + 8])) == set()
    assert "frozen_tail" in kinds(to_video(np.concatenate([stop_and_go, np.repeat(stop_and_go[-1:], 96, axis=0)])))


@pytest.mark.parametrize("course", [lambda x: 1 - np.cos(x), lambda x: np.sin(2 * x), lambda x: np.sin(3 * x)])
def test_drift_that_comes_and_goes_is_none(course):
    frames = moving_shapes()
    frames += 18 * course(2 * np.pi * np.arange(len(frames)) / len(frames))[:, None, None, None]
    assert kinds(to_video(frames)) == set()


def test_late_drift_is_one():
    frames = moving_shapes()
    frames -= 50 * np.linspace(-3, 1, len(frames)).clip(0)[:, None, None, None]
    assert kinds(to_video(frames)) == {"colour_drift"}


def test_seams():
    frames = moving_shapes()
    starts = tuple(range(0, 128, 12))
    assert measured(to_video(frames), chunk_starts=starts)["proxy/chunk_seam_ratio"].value == pytest.approx(1, abs=0.2)
    jump = np.random.default_rng(1).normal(0, 14, (len(starts), *SIZE, 1)).repeat(12, axis=0)[: len(frames)]
    scores = measured(to_video(frames + jump), chunk_starts=starts)
    assert scores["proxy/chunk_seam_ratio"].value > 3
    assert "seams" in {flag.kind for flag in _find_flags(scores)}
    unknown = measured(to_video(frames))["proxy/chunk_seam_ratio"]
    assert unknown.value is None and "chunk_starts" in unknown.skipped


def test_missing_scores_raise_no_flags():
    scores = measured(to_video(make("static")))
    assert _find_flags({}) == []
    without = {name: Score.none("not measured") for name in scores}
    assert _find_flags(without) == []
    assert {measure for measure, _ in KINDS.values()} <= scores.keys()
    written = VideoScores(video=ManifestLine(id="v", file="v.mp4"), scores=scores).to_json()
    assert _find_flags(VideoScores.from_json(written).scores) == _find_flags(scores) != []


def test_a_measure_without_its_defence_fails(monkeypatch):
    """The median over the cells alone takes stripes for flicker: the mean is there for a reason."""
    columns = np.arange(96)[None, :] + 3 * np.arange(8 * FPS)[:, None]
    stripes = np.where(columns % 16 < 7, 160.0, 60.0)
    video = to_video(np.broadcast_to(stripes[:, None, :, None], (len(stripes), 72, 96, 3)))

    def median_only(track):
        cells = track.luma.reshape(track.num_frames, -1)
        smooth = np.stack([cells[max(0, t - 4) : t + 5].mean(axis=0) for t in range(len(cells))])
        return np.median(cells - smooth, axis=1)

    assert measured(video, measures=(course.FLICKER,))["proxy/flicker_excess"].value < 1.0
    monkeypatch.setattr(course, "_brightness_swings", median_only)
    assert measured(video, measures=(course.FLICKER,))["proxy/flicker_excess"].value > 3.0
