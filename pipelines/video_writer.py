"""Append-only fragmented MP4: frames go in block by block, the file on disk is playable at every moment.

ffmpeg (from imageio-ffmpeg) encodes to a pipe and this process appends the finished fragments to the file, so that
a full disk is an ``OSError`` here, and a run can stop and go on: every ``flush`` ends one encoder and the next one
continues the same file, with the fragments' numbers and times moved behind what is there.
"""

import contextlib
import os
import subprocess
import threading
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import imageio_ffmpeg
import numpy as np

from longtake.pipelines import fragments

# Encoder pictures per second of video and file fragment: one second, the unit in which a killed run loses video.
GROUP_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class VideoFormat:
    """What the file holds; the same for all parts of one video.

    Attributes:
        height: Picture height in pixels, before ``scale``; even.
        width: Picture width in pixels, before ``scale``; even.
        fps: Frames per second.
        crf: H.264 constant rate factor: 0 (lossless) to 51; 18 is visually clean.
        scale: Whole-number enlargement of every pixel, so that a 64-pixel video is watchable.
        threads: Of the encoder, which cuts pictures into as many slices; 0 leaves it to the number of cores, and then
            the bytes depend on the machine.
    """

    height: int
    width: int
    fps: float = 16.0
    crf: int = 18
    scale: int = 1
    threads: int = 0

    def __post_init__(self) -> None:
        if self.height % 2 or self.width % 2 or self.height <= 0 or self.width <= 0:
            raise ValueError(f"video size {self.width}x{self.height}: H.264 needs even, positive sides")
        if not 0 < self.fps < 1000:
            raise ValueError(f"fps={self.fps}: give a number between 0 and 1000")
        if not 0 <= self.crf <= 51:
            raise ValueError(f"crf={self.crf}: give 0 (lossless) to 51 (smallest); 18 is visually clean")
        if self.scale < 1:
            raise ValueError(f"scale={self.scale}: give a whole number of 1 or more")
        if self.threads < 0:
            raise ValueError(f"threads={self.threads}: give 1 or more, or 0 for the encoder's own choice")

    def ffmpeg_command(self) -> list[str]:
        """Return the encoder's command line: raw RGB on its input, a fragmented MP4 on its output."""
        rate = Fraction(self.fps).limit_denominator(1001)
        enlarge = f"scale=iw*{self.scale}:ih*{self.scale}:flags=neighbor," if self.scale > 1 else ""
        colours = f"{enlarge}scale=out_color_matrix=bt709:out_range=tv"
        tags = ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]
        # No B-frames and no look-ahead: decode order is display order, so parts join by moving their times, and a
        # frame leaves the encoder as soon as it is in.
        codec = ["-c:v", "libx264", "-preset", "veryfast", "-tune", "zerolatency", "-bf", "0", "-sc_threshold", "0"]
        codec += ["-threads", str(self.threads)] if self.threads else []
        group = str(max(1, round(self.fps * GROUP_SECONDS)))
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{self.width}x{self.height}", "-r", str(rate)]
        return [
            *(imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "fatal", "-nostdin"),
            *(*source, "-i", "pipe:0", "-an", "-vf", colours, *codec, "-crf", str(self.crf), "-g", group),
            *("-pix_fmt", "yuv420p", *tags, "-video_track_timescale", str(rate.numerator * 1000)),
            *("-movflags", "+frag_keyframe+empty_moov+default_base_moof", "-f", "mp4", "pipe:1"),
        ]


class VideoWriter:
    """Write one video, in one go or in several runs of the program.

    Use as a context manager: leaving it closes the file with every frame written so far in it.
    """

    def __init__(self, path: Path, *, video_format: VideoFormat, num_frames: int = 0) -> None:
        """Start a video, or go on with one.

        Args:
            path: The file. Must not exist when ``num_frames`` is 0, and must exist otherwise.
            video_format: Size, rate and quality; when going on, the same as before.
            num_frames: Frames of the existing file to keep; the file is cut behind them. Must be a number at which
                the file was flushed.

        Raises:
            FileExistsError: If a new video's file exists.
            ValueError: If the existing file cannot be cut behind ``num_frames``.
        """
        self.path = path
        self.video_format = video_format
        self.num_frames = num_frames
        self._encoder: _Encoder | None = None
        if num_frames == 0:
            self._file: BinaryIO = path.open("xb", buffering=0)
        else:
            end = fragments.find_end(path, num_frames=num_frames)
            self._file = path.open("r+b", buffering=0)
            self._file.truncate(end)
            self._file.seek(end)

    def abandon(self) -> None:
        """Stop the encoder and close the file as it is; after ``close`` this does nothing."""
        if self._encoder is not None:
            encoder, self._encoder = self._encoder, None
            encoder.kill()
        self._file.close()

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, frames: np.ndarray) -> None:
        """Append frames.

        Args:
            frames: (frames, height, width, 3), uint8, RGB.

        Raises:
            ValueError: If shape or dtype do not fit the video.
            OSError: If the file cannot be written, for example because the disk is full.
        """
        expected = (self.video_format.height, self.video_format.width, 3)
        if frames.ndim != 4 or frames.shape[1:] != expected or frames.dtype != np.uint8:
            raise ValueError(f"frames are {frames.dtype} {frames.shape}, this video takes uint8 (frames, *{expected})")
        if self._encoder is None:
            self._encoder = _Encoder(self.video_format, self._file, num_frames=self.num_frames)
        for frame in frames:
            self._encoder.write(np.ascontiguousarray(frame).data)
            self.num_frames += 1

    def flush(self) -> None:
        """Bring every frame written so far into the file and onto the disk.

        Raises:
            OSError: If the file cannot be written, for example because the disk is full.
        """
        if self._encoder is not None:
            encoder, self._encoder = self._encoder, None
            encoder.finish()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close the file; calling it again does nothing."""
        if self._file.closed:
            return
        try:
            self.flush()
        finally:
            self._file.close()


class _Encoder:
    """One ffmpeg process and the thread that appends its fragments to the file."""

    def __init__(self, video_format: VideoFormat, file: BinaryIO, *, num_frames: int) -> None:
        self._file = file
        self._num_frames = num_frames
        self._failure: BaseException | None = None
        self._error: OSError | None = None
        # Its own session: Ctrl-C in a terminal must reach the program that drives it, not the encoder.
        self._process = subprocess.Popen(
            video_format.ffmpeg_command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._thread = threading.Thread(target=self._append_fragments, daemon=True)
        self._thread.start()

    def write(self, frame: memoryview) -> None:
        try:
            self._process.stdin.write(frame)
        except BrokenPipeError as error:
            raise self._stopped() from error

    def finish(self) -> None:
        if self._error is not None:
            raise self._error
        try:
            self._process.stdin.close()
        except BrokenPipeError as error:
            raise self._stopped() from error
        self._thread.join()
        if self._process.wait() != 0 or self._failure is not None:
            raise self._stopped()
        self._close_pipes()

    def _close_pipes(self) -> None:
        # The encoder is gone: what the input still buffers has nowhere to go.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.stderr.close()

    def kill(self) -> None:
        self._process.kill()
        self._thread.join()
        self._process.wait()
        self._close_pipes()

    def _append_fragments(self) -> None:
        """Runs in the thread; what fails here is raised by the next write or finish."""
        try:
            mover = fragments.FragmentMover(self._file, num_frames=self._num_frames)
            mover.copy(self._process.stdout)
        except (OSError, ValueError) as error:
            self._failure = error
            # Without a reader the encoder would block for ever, and the writer with it.
            self._process.kill()

    def _stopped(self) -> OSError:
        """Why the encoder is gone; asked again after the pipes are closed, it answers the same."""
        if self._error is None:
            self._process.kill()
            self._thread.join()
            self._process.wait()
            message = self._process.stderr.read().decode(errors="replace").strip().splitlines()
            self._close_pipes()
            self._error = self._reason(message[-1] if message else "no message")
        return self._error

    def _reason(self, message: str) -> OSError:
        if isinstance(self._failure, OSError):
            return self._failure
        if self._failure is not None:
            return OSError(f"video encoder: {self._failure}")
        return OSError(f"video encoder stopped: {message}")
