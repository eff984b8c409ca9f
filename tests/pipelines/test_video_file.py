"""The video on disk is playable while it is written, survives a kill, and continues frame for frame."""

import errno
import os
import signal
import subprocess
import sys
import time

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from longtake.pipelines import video_file
from longtake.pipelines.video_file import VideoFormat, VideoWriter, write_contact_sheet

FORMAT = VideoFormat(height=32, width=48, crf=4)
FORMAT_32 = VideoFormat(height=32, width=32, crf=4)


def make_frames(start, stop, *, height=32, width=48):
    """Frames whose red channel counts and whose other channels are gradients."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    frames = np.stack([np.broadcast_to(rows * 4, rows.shape), rows * 4, columns * 4], axis=-1)
    frames = np.repeat(frames[None], stop - start, axis=0)
    frames[..., 0] = (np.arange(start, stop) * 3 % 256)[:, None, None]
    return frames


def decode(path, *, height=32, width=48):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24"]
    result = subprocess.run([*command, "pipe:1"], capture_output=True, check=True)
    assert not result.stderr, result.stderr
    return np.frombuffer(result.stdout, np.uint8).reshape(-1, height, width, 3)


def assert_counts(video, num_frames):
    """Every frame is there once, in order."""
    assert len(video) == num_frames
    expected = make_frames(0, num_frames)[..., 0].mean(axis=(1, 2))
    assert np.abs(video[..., 0].mean(axis=(1, 2)) - expected).max() < 2.5


def test_flushed_parts_make_one_video(tmp_path):
    path = tmp_path / "video.mp4"
    with VideoWriter(path, video_format=FORMAT) as writer:
        for start in range(0, 60, 12):
            writer.write(make_frames(start, start + 12))
            writer.flush()
            assert video_file.count_frames(path) == start + 12
            writer.flush()
        writer.write(make_frames(60, 70))
    writer.close()
    assert video_file.count_frames(path) == 70
    assert_counts(decode(path), 70)


@pytest.mark.parametrize("keep", [9, 21])
def test_a_cut_video_goes_on_exactly(tmp_path, keep):
    path = tmp_path / "video.mp4"
    with VideoWriter(path, video_format=FORMAT) as writer:
        for start, stop in ((0, 9), (9, 21), (21, 70)):
            writer.write(make_frames(start, stop) if stop <= keep else 255 - make_frames(start, stop))
            writer.flush()
    with path.open("ab") as file:
        file.write(b"\x00\x00\x10\x00moofhalf a fragment")
    for _ in range(2):
        with VideoWriter(path, video_format=FORMAT, num_frames=keep) as writer:
            writer.write(make_frames(keep, 50))
    assert_counts(decode(path), 50)


def test_a_copy_holds_the_first_frames_and_nothing_is_overwritten(tmp_path):
    path, copy = tmp_path / "video.mp4", tmp_path / "copy.mp4"
    with VideoWriter(path, video_format=FORMAT) as writer:
        writer.write(make_frames(0, 21))
        writer.flush()
        writer.write(make_frames(21, 33))
    before = path.read_bytes()
    video_file.copy_frames(path, copy, num_frames=21)
    assert_counts(decode(copy), 21)
    for refused, error, message in (
        (lambda: video_file.copy_frames(path, copy, num_frames=21), FileExistsError, "copy.mp4"),
        (
            lambda: video_file.copy_frames(path, tmp_path / "5.mp4", num_frames=5),
            ValueError,
            "no fragment ends",
        ),
        (lambda: VideoWriter(path, video_format=FORMAT, num_frames=34), ValueError, "holds 33 frames, 34 are needed"),
        (lambda: VideoWriter(path, video_format=FORMAT), FileExistsError, "video.mp4"),
    ):
        with pytest.raises(error, match=message):
            refused()
    assert path.read_bytes() == before


def test_pixels_can_be_enlarged(tmp_path):
    path = tmp_path / "video.mp4"
    with VideoWriter(path, video_format=VideoFormat(height=32, width=48, crf=0, scale=3)) as writer:
        writer.write(make_frames(0, 5))
    video = decode(path, height=96, width=144)
    assert len(video) == 5
    assert np.abs(video[:, 1::3, 1::3].astype(int) - make_frames(0, 5)).mean() < 6


SCRIPT = """
import sys, time, pathlib
sys.path.insert(0, {tests!r})
from test_video_file import FORMAT, make_frames
from longtake.pipelines.video_file import VideoWriter
with VideoWriter(pathlib.Path({path!r}), video_format=FORMAT) as writer:
    for start in range(0, 10_000, 12):
        writer.write(make_frames(start, start + 12))
        sys.stdout.write(f"{{start + 12}}\\n"); sys.stdout.flush()
        time.sleep(0.02)
"""


def test_a_killed_program_leaves_a_playable_video(tmp_path):
    path = tmp_path / "video.mp4"
    script = SCRIPT.format(tests=os.path.dirname(__file__), path=str(path))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        written = 0
        while written < 120:
            written = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    time.sleep(0.2)
    video = decode(path)
    # All but the second that is being encoded, and what ffmpeg still holds between its threads.
    assert len(video) >= written - 16 - 16
    assert_counts(video, len(video))


class FullDisk:
    """A file on a disk that fills up after some bytes."""

    def __init__(self, file, room):
        self.file, self.room, self.name = file, room, file.name

    def write(self, data):
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self.file.write(data[: self.room])
        self.room -= taken
        return taken

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_is_an_error_and_leaves_whole_fragments(tmp_path):
    path = tmp_path / "video.mp4"
    writer = VideoWriter(path, video_format=FORMAT)
    writer.write(make_frames(0, 12))
    writer.flush()
    writer._file = FullDisk(writer._file, room=100)
    with pytest.raises(OSError) as error:
        for start in range(12, 2000, 12):
            writer.write(make_frames(start, start + 12))
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(OSError):
        writer.close()
    assert_counts(decode(path), 12)
    with VideoWriter(path, video_format=FORMAT, num_frames=12) as writer:
        writer.write(make_frames(12, 30))
    assert_counts(decode(path), 30)


def test_other_encoder_parameters_are_refused(tmp_path):
    path = tmp_path / "video.mp4"
    with VideoWriter(path, video_format=FORMAT) as writer:
        writer.write(make_frames(0, 12))
    other = VideoFormat(height=48, width=48)
    writer = VideoWriter(path, video_format=other, num_frames=12)
    with pytest.raises(OSError, match="differ from those the video began with"):
        writer.write(make_frames(0, 600, height=48))
        writer.flush()


def test_bad_input_is_refused(tmp_path):
    for bad in ({"height": 31}, {"fps": 0.0}, {"crf": 60}, {"scale": 0}):
        with pytest.raises(ValueError, match=next(iter(bad)) if "height" not in bad else "even"):
            VideoFormat(**{"height": 32, "width": 48} | bad)
    with VideoWriter(tmp_path / "video.mp4", video_format=FORMAT) as writer:
        for frames in (make_frames(0, 2).astype(np.float32), make_frames(0, 2)[0], make_frames(0, 2, height=48)):
            with pytest.raises(ValueError, match="this video takes uint8"):
                writer.write(frames)


@pytest.mark.parametrize("num_tiles", [4, 12])
def test_a_contact_sheet_shows_the_frames_of_its_times(tmp_path, num_tiles):
    """The video was written in two parts; two rows of two pictures, the middle of each tells its time."""
    video, sheet = tmp_path / "video.mp4", tmp_path / "sheet.png"
    frames = np.zeros((61, 32, 32, 3), np.uint8) + np.arange(61, dtype=np.uint8)[:, None, None, None] * 4
    with VideoWriter(video, video_format=FORMAT_32) as writer:
        writer.write(frames[:33])
    with VideoWriter(video, video_format=FORMAT_32, num_frames=33) as writer:
        writer.write(frames[33:])
    write_contact_sheet(video, sheet, fps=16, num_tiles=num_tiles, num_columns=num_tiles // 2)
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("L")).astype(int)
    height, width = pixels.shape
    across = (np.arange(num_tiles // 2) + 0.5) / (num_tiles // 2)
    centres = [pixels[int(height * y), int(width * x)] for y in (0.2, 0.7) for x in across]
    assert np.abs(np.array(centres) - 4 * np.linspace(0, 60, num_tiles).round()).max() < 4
