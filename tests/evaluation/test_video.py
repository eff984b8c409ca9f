"""A video gives the same frames however it is stored and cut, in memory that does not grow with its length."""

import gc
import hashlib
import subprocess
import tracemalloc
import weakref
from dataclasses import replace

import av
import imageio_ffmpeg
import numpy as np
import psutil
import pytest
from PIL import Image

from longtake.evaluation.metric import MetricSpec, Score, VideoInfo
from longtake.evaluation.video import VideoSource, find_videos, measure
from longtake.pipelines import video_file

LOSSLESS = ("-c:v", "libx264rgb", "-crf", "0", "-preset", "ultrafast")
NTSC = 24000 / 1001


def moving(num_frames=20, height=48, width=64):
    """A ramp that moves, with its frame number in a corner: no two frames are equal."""
    y, x = np.mgrid[0:height, 0:width]
    frames = [np.stack([x * 3 + 5 * t, y * 4 - 3 * t, x + y + t], -1) % 256 for t in range(num_frames)]
    return np.stack(frames).astype(np.uint8)


def ffmpeg(*arguments, data=None):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *map(str, arguments)]
    subprocess.run(command, input=data, check=True, capture_output=True)


def write(path, frames, *options, fps=16.0):
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(fps), "-i", "-")
    ffmpeg(*raw, *(options or LOSSLESS), path, data=frames.tobytes())
    return path


def decoded(source, length=16):
    return np.concatenate(list(source.pieces(length)))


def info_of(source, **changes):
    facts = {"num_frames": source.num_frames, "fps": source.fps, "height": source.height, "width": source.width}
    return replace(VideoInfo(id="take", **facts), **changes)


class Recorder:
    """A metric that keeps what it is given."""

    def __init__(self, name="proxy/recorded", scores=None, error=None):
        self.specs = (MetricSpec(name=name, higher_is_better=None),)
        self.frames, self.scores, self.error = [], scores, error

    def start(self, video):
        self.video = video
        return self

    def push(self, frames):
        if self.error:
            raise self.error
        self.frames.append(frames.copy())

    def finish(self):
        return {self.specs[0].name: Score(value=1.0)} if self.scores is None else self.scores


@pytest.mark.parametrize(("fps", "size"), [(16, (48, 64)), (8, (75, 91)), ("24000/1001", (50, 34)), (12.5, (33, 47))])
def test_a_lossless_file_gives_its_frames_back(tmp_path, fps, size):
    frames = moving(21, *size)
    source = VideoSource.open(write(tmp_path / "take.mp4", frames, fps=fps))
    assert (source.num_frames, source.height, source.width) == frames.shape[:3]
    assert source.fps == (NTSC if isinstance(fps, str) else fps)
    for length in (1, 8, 16, 100):
        pieces = list(source.pieces(length))
        assert [len(piece) for piece in pieces] == [min(length, 21 - at) for at in range(0, 21, length)]
        np.testing.assert_array_equal(np.concatenate(pieces), frames)


def test_any_file_name_can_be_read(tmp_path):
    path = write(tmp_path / "plain.mp4", moving(3))
    for name in ("two words.mp4", "concat:a|b.mp4", "-take.mp4", "50%d.mp4", "écran.mp4", "a'b\".mp4"):
        path = path.rename(tmp_path / name)
        assert VideoSource.open(path).num_frames == 3


@pytest.mark.parametrize(
    ("ending", "options", "is_exact"),
    [
        ("mkv", ("-c:v", "ffv1", "-pix_fmt", "gbrp"), True),
        ("avi", ("-c:v", "mjpeg", "-q:v", "1"), False),
        ("mov", ("-c:v", "prores_ks"), False),
        ("webm", ("-c:v", "libvpx-vp9", "-cpu-used", "8", "-b:v", "2M", "-auto-alt-ref", "1"), False),
        ("mp4", ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-bf", "3", "-crf", "5"), False),
        ("mp4", ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-flags", "+ildct+ilme", "-crf", "5"), False),
    ],
)
def test_containers_and_codecs(tmp_path, ending, options, is_exact):
    frames = moving(30)
    source = VideoSource.open(write(tmp_path / f"take.{ending}", frames, *options))
    assert (source.num_frames, source.fps) == (30, 16.0)
    error = np.abs(decoded(source).astype(int) - frames).mean(axis=(1, 2, 3))
    # The sawtooth colours suffer under 4:2:0; a frame too early or too late would be off by far more.
    assert error.max() == 0 if is_exact else error.max() < 25
    assert len(error) == 30


def test_hidden_packets_are_no_frames(tmp_path):
    """VP8 stores pictures that are never shown; counting packets would promise frames that do not come."""
    options = ("-c:v", "libvpx", "-auto-alt-ref", "1", "-lag-in-frames", "16", "-b:v", "200k", "-cpu-used", "5")
    path, log = tmp_path / "take.webm", ("-passlogfile", tmp_path / "log")
    write("-", moving(60), *options, "-pass", "1", *log, "-f", "null")
    write(path, moving(60), *options, "-pass", "2", *log)
    with av.open(path) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) > 60
    source = VideoSource.open(path)
    assert source.num_frames == 60 == len(decoded(source))


def test_edit_lists_uneven_lengths_and_rotations_are_followed(tmp_path):
    write(tmp_path / "long.mp4", moving(64), "-c:v", "libx264", "-g", "32", "-bf", "2", "-pix_fmt", "yuv420p")
    ffmpeg("-ss", "0.8", "-i", tmp_path / "long.mp4", "-c", "copy", tmp_path / "cut.mp4")
    source = VideoSource.open(tmp_path / "cut.mp4")
    assert source.num_frames == len(decoded(source)) < 64 and source.fps == 16

    frames = moving(12)
    uneven = ("-vf", "setpts='if(lt(N,6),N,6+(N-6)*4)/16/TB'", "-fps_mode", "vfr", *LOSSLESS)
    source = VideoSource.open(write(tmp_path / "uneven.mp4", frames, *uneven))
    np.testing.assert_array_equal(decoded(source), frames)
    assert 5 < source.fps < 9

    write(tmp_path / "plain.mp4", frames)
    ffmpeg("-display_rotation", "90", "-i", tmp_path / "plain.mp4", "-c", "copy", tmp_path / "turned.mp4")
    source = VideoSource.open(tmp_path / "turned.mp4")
    assert (source.height, source.width) == (64, 48)
    np.testing.assert_array_equal(decoded(source), np.rot90(frames, axes=(1, 2)))


def test_sound_and_cover_are_no_video(tmp_path):
    write(tmp_path / "plain.mp4", moving(8))
    tone = ("-f", "lavfi", "-i", "sine=duration=1")
    ffmpeg(*tone, "-i", tmp_path / "plain.mp4", "-map", "0:a", "-map", "1:v", "-c:v", "copy", tmp_path / "both.mkv")
    np.testing.assert_array_equal(decoded(VideoSource.open(tmp_path / "both.mkv")), moving(8))
    ffmpeg(*tone, tmp_path / "sound.mp4")
    with pytest.raises(ValueError, match="no video stream"):
        VideoSource.open(tmp_path / "sound.mp4")


def test_colours_are_those_of_opencv(tmp_path):
    """VBench reads through OpenCV; another conversion from YUV moves every score a little."""
    cv2 = pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    path = write(tmp_path / "take.mp4", moving(4, 96, 160), "-c:v", "libx264", "-pix_fmt", "yuv420p")
    reader = cv2.VideoCapture(str(path))
    theirs = np.stack([cv2.cvtColor(reader.read()[1], cv2.COLOR_BGR2RGB) for _ in range(4)])
    np.testing.assert_array_equal(decoded(VideoSource.open(path)), theirs)


def test_a_gif_is_what_pillow_sees(tmp_path):
    pictures = [Image.fromarray(frame).quantize(32) for frame in moving(6)]
    pictures[0].save(tmp_path / "take.gif", save_all=True, append_images=pictures[1:], duration=80, loop=0)
    source = VideoSource.open(tmp_path / "take.gif")
    assert (source.num_frames, source.fps) == (6, 12.5)
    with Image.open(tmp_path / "take.gif") as image:
        for index, frame in enumerate(decoded(source)):
            image.seek(index)
            np.testing.assert_array_equal(frame, np.asarray(image.convert("RGB")))


def test_a_folder_of_frames_is_read_in_natural_order(tmp_path):
    frames = moving(12)
    frames[:4] = 80
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"frame{index}.png")
    for index, mode in enumerate(("P", "RGBA", "L")):  # all become RGB
        grey = Image.fromarray(frames[index])
        (grey.quantize(2) if mode == "P" else grey.convert(mode)).save(tmp_path / f"frame{index}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / ".hidden.png").write_bytes(b"")
    source = VideoSource.open(tmp_path, fps=8)
    assert (source.num_frames, source.fps, source.path) == (12, 8, tmp_path)
    np.testing.assert_array_equal(decoded(source, 5), frames)
    with pytest.raises(ValueError, match="give fps"):
        VideoSource.open(tmp_path)
    Image.new("RGB", (32, 32)).save(tmp_path / "frame12.png")
    with pytest.raises(ValueError, match="frame0.png is 64x48, frame12.png is 32x32: make them equal"):
        VideoSource.open(tmp_path, fps=8)


def test_an_array_is_a_video_and_hashes_tell_contents_apart(tmp_path):
    frames = moving(20)
    source = VideoSource.from_array(frames, 16)
    assert source.path is None and source.num_frames == 20
    np.testing.assert_array_equal(decoded(source, 7), frames)
    assert source.sha256() == hashlib.sha256(frames.tobytes()).hexdigest()
    for wrong in (frames.astype(np.float32), frames[0], frames[..., :2], frames[:0]):
        with pytest.raises(ValueError, match="give uint8"):
            VideoSource.from_array(wrong, 16)
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="give frames per second above 0"):
            VideoSource.from_array(frames, fps)
    with pytest.raises(ValueError, match="at least one frame"):
        source.pieces(0)
    path = write(tmp_path / "take.mp4", frames)
    assert VideoSource.open(path).sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
    for index in range(2):
        (tmp_path / str(index)).mkdir()
        Image.fromarray(frames[index]).save(tmp_path / str(index) / "0.png")
    first, second = (VideoSource.open(tmp_path / name, fps=1).sha256() for name in "01")
    assert first != second


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.mp4", None, "no video at"),
        ("empty.mp4", "", "cannot read .*empty.mp4 as a video"),
        ("text.mp4", "no video" * 100, "cannot read .*text.mp4 as a video: Invalid data"),
        # Playlists can point to files and addresses; a video must not.
        ("list.mp4", "ffconcat version 1.0\nfile {folder}/secret.mp4\n", "cannot read"),
        ("play.mp4", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://localhost:9/a.ts\n", "cannot read"),
        ("0.png", "no picture", "cannot read the frame .*0.png"),
        ("notes.txt", "", "holds no frames"),
    ],
)
def test_what_is_no_video_is_refused(tmp_path, name, content, message):
    write(tmp_path / "secret.mp4", moving(3))
    folder = tmp_path / "given"
    folder.mkdir()
    if content is not None:
        (folder / name).write_text(content.format(folder=tmp_path))
    with pytest.raises(ValueError, match=message) as caught:
        VideoSource.open(folder / name if name.endswith(".mp4") else folder, fps=8)
    assert "\n" not in str(caught.value)


def test_cut_off_files_and_pictures_that_the_decoder_makes_up_are_refused(tmp_path):
    path = write(tmp_path / "cut.mp4", moving(64), *LOSSLESS, "-movflags", "+faststart")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="cut off or damaged"):
        VideoSource.open(path)
    options = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-movflags", "+faststart", "-crf", "5")
    path = write(tmp_path / "take.mp4", moving(64), *options)
    content = bytearray(path.read_bytes())
    for index in range(len(content) // 2, len(content), 97):
        content[index] ^= 0x55
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="is damaged|decodes to"):
        decoded(VideoSource.open(path))


def test_leaving_early_stops_the_decoder(tmp_path):
    def open_videos():
        return [file.path for file in psutil.Process().open_files() if file.path.endswith(".mp4")]

    path = write(tmp_path / "take.mp4", moving(200, 96, 128))
    source = VideoSource.open(path)
    pieces = source.pieces(2)
    next(pieces)
    assert open_videos() == [str(path)]
    pieces.close()
    list(source.pieces())
    with pytest.raises(RuntimeError, match="on video 'take': full"):
        measure(source, info_of(source), [Recorder(error=OSError("full"))])
    gc.collect()
    assert open_videos() == []


class Counting(Recorder):
    """Keeps nothing but one frame, and counts the pieces that are alive."""

    most = 0

    def push(self, frames):
        self.alive = [ref for ref in (*self.frames, weakref.ref(frames)) if ref() is not None]
        self.frames, self.most = self.alive, max(self.most, len(self.alive))
        self.last = frames[-1].copy()


def test_memory_does_not_grow_with_length(tmp_path):
    """The peak of a video of sixteen times the frames is the same, and far under its size."""
    peaks = []
    for seconds in (2, 32):
        path, metric = tmp_path / f"{seconds}.mp4", Counting()
        noise = ("-f", "lavfi", "-i", f"testsrc2=size=320x192:rate=16:duration={seconds}")
        ffmpeg(*noise, "-c:v", "libx264", "-preset", "ultrafast", path)
        source = VideoSource.open(path)
        tracemalloc.start()
        measure(source, info_of(source), [metric])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert 1 <= metric.most <= 2
    piece = 16 * 320 * 192 * 3
    assert peaks[1] < 1.05 * peaks[0] + 1e5
    assert peaks[1] < 3 * piece < 32 * piece


def test_all_metrics_share_one_decoding(tmp_path, monkeypatch):
    frames = moving(40)
    source = VideoSource.open(write(tmp_path / "take.mp4", frames))
    streams = []
    real = video_file.read_frames
    monkeypatch.setattr("longtake.evaluation.video.read_frames", lambda *a, **k: streams.append(1) or real(*a, **k))
    metrics = [Recorder("proxy/a"), Recorder("proxy/b")]
    scores = measure(source, info_of(source, prompt="a ramp"), metrics)
    assert list(scores) == ["proxy/a", "proxy/b"] and streams == [1]
    for metric in metrics:
        np.testing.assert_array_equal(np.concatenate(metric.frames), frames)
        assert metric.video.prompt == "a ramp"


def test_what_a_metric_does_wrong_names_it_and_the_video():
    source = VideoSource.from_array(moving(4), 16)
    missing = r"proxy/a on video 'take': missing \['proxy/a'\], not promised \['proxy/x'\]"
    with pytest.raises(RuntimeError, match=missing):
        measure(source, info_of(source), [Recorder("proxy/a", {"proxy/x": Score(value=1.0)})])
    with pytest.raises(ValueError, match="'proxy/a' is asked for twice"):
        measure(source, info_of(source), [Recorder("proxy/a"), Recorder("proxy/a")])
    with pytest.raises(ValueError, match="said to have 5 frames of 64x48, but has 4 of 64x48"):
        measure(source, info_of(source, num_frames=5), [Recorder()])
    for error, kind in ((ValueError("too small"), ValueError), (KeyError("x"), RuntimeError)):
        with pytest.raises(kind, match="metric proxy/a on video 'take': "):
            measure(source, info_of(source), [Recorder("proxy/a", error=error)])


def test_videos_of_a_folder_are_found_in_natural_order(tmp_path):
    for name in ("p10b.mp4", "p10a.mp4", "p2.MP4", "P1.webm", "x.gif", "notes.txt", ".p0.mp4"):
        (tmp_path / name).write_bytes(b"")
    for folder, name in (("frames", "0.png"), ("run", "sheet.png"), ("other", "readme.md")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(b"")
    (tmp_path / "run" / "take.mp4").write_bytes(b"")
    ordered = ["frames", "P1.webm", "p2.MP4", "p10a.mp4", "p10b.mp4", "x.gif"]
    assert [path.name for path in find_videos(tmp_path)] == ordered
    assert find_videos(tmp_path / "frames") == [tmp_path / "frames"]
    assert find_videos(tmp_path / "other") == []
    with pytest.raises(ValueError, match="no folder of videos"):
        find_videos(tmp_path / "missing")
