"""Video files: append-only fragmented MP4, exact reading of any format, contact sheets.

Frames are appended block by block and the file is playable at every moment: the encoder's finished fragments (one
second each) go to the file whole, and the next process continues it behind any flushed frame. PyAV is used directly
because imageio's pyav plugin sets neither muxer options nor the colour matrix, and does not report damaged frames.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, cast

import av
import imageio.v3 as iio
import numpy as np
from av.container import InputContainer, OutputContainer
from av.stream import Disposition
from av.video.reformatter import Colorspace, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, ImageDraw, ImageFont

from longtake.pipelines.checkpoint import with_temporary

# Encoder pictures per second of video and file fragment: one second, the unit in which a killed run loses video.
_GROUP_SECONDS = 1.0
# No B-frames and no look-ahead: a frame leaves the encoder as soon as it is in.
_ENCODER = {"preset": "veryfast", "tune": "zerolatency", "bf": "0", "sc_threshold": "0"}
# Fragments keep their frames' times and numbers, so that an encoder continues the file of an earlier one.
_MUXER = {
    "movflags": "frag_keyframe+empty_moov+default_base_moof+frag_discont+skip_trailer",
    "avoid_negative_ts": "disabled",
}
# In a container of these, a packet is a frame: counting packets is enough, and hundreds of times faster than decoding.
_FRAME_PER_PACKET = {"av1", "ffv1", "gif", "h264", "hevc", "mjpeg", "png", "prores", "rawvideo", "vp9"}
_TILE_WIDTH, _LABEL_HEIGHT, _MARGIN = 192, 24, 6


@dataclass(frozen=True, kw_only=True)
class VideoFormat:
    """Size, rate and quality of a video file, the same for all parts of one video."""

    height: int  # pixels before ``scale``; even
    width: int
    fps: float = 16.0
    crf: int = 18  # H.264 constant rate factor: 0 (lossless) to 51; 18 is visually clean
    scale: int = 1  # whole-number enlargement of every pixel, so that a 64-pixel video is watchable
    # The encoder cuts pictures into as many slices; 0: as many as cores, and the bytes depend on the machine.
    threads: int = 0

    def __post_init__(self) -> None:
        if self.height % 2 or self.width % 2 or self.height <= 0 or self.width <= 0:
            raise ValueError(f"video size {self.width}x{self.height}: H.264 needs even, positive sides")
        for name, is_right, remedy in (
            ("fps", 0 < self.fps < 1000, "a number between 0 and 1000"),
            ("crf", 0 <= self.crf <= 51, "0 (lossless) to 51 (smallest); 18 is visually clean"),
            ("scale", self.scale >= 1, "a whole number of 1 or more"),
            ("threads", self.threads >= 0, "1 or more, or 0 for the encoder's own choice"),
        ):
            if not is_right:
                raise ValueError(f"{name}={getattr(self, name)}: give {remedy}")


class VideoWriter:
    """Write one video, in one go or in several runs of the program; leaving its context closes the file.

    With ``num_frames`` an existing file of the same format is cut behind so many frames, a number at which it was
    flushed, and continued.

    Raises:
        FileExistsError: If a new video's file exists.
        ValueError: If the existing file cannot be cut behind ``num_frames``.
    """

    def __init__(self, path: Path, *, video_format: VideoFormat, num_frames: int = 0) -> None:
        self.path = path
        self.video_format = video_format
        self.num_frames = num_frames
        self._encoder: _Encoder | None = None
        self._thread = ThreadPoolExecutor(1, "video-encoder")
        self._encoding: Future[None] | None = None
        if num_frames == 0:
            self._file: BinaryIO = path.open("xb", buffering=0)
        else:
            end = _find_end(path, num_frames=num_frames)
            self._file = path.open("r+b", buffering=0)
            self._file.truncate(end)
            self._file.seek(end)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, frames: np.ndarray) -> None:
        """Append (frames, height, width, 3) uint8 RGB; encoded while the caller goes on, so not to be changed.

        Raises:
            ValueError: If shape or dtype do not fit the video.
            OSError: If the file cannot be written, for example because the disk is full.
        """
        expected = (self.video_format.height, self.video_format.width, 3)
        if frames.ndim != 4 or frames.shape[1:] != expected or frames.dtype != np.uint8:
            raise ValueError(f"frames are {frames.dtype} {frames.shape}, this video takes uint8 (frames, *{expected})")
        self._wait()
        self._encoding = self._thread.submit(self._encode, frames, self.num_frames)
        self.num_frames += len(frames)

    def flush(self) -> None:
        """Bring every frame written so far into the file and onto the disk."""
        self._wait()
        if self._encoder is not None:
            encoder, self._encoder = self._encoder, None
            self._append(encoder.finish())
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file.closed:
            return
        try:
            self.flush()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Stop the encoder and close the file as it is; after ``close`` this does nothing."""
        self._thread.shutdown()
        self._encoder = None
        self._file.close()

    def _wait(self) -> None:
        """Wait for the frames of the last ``write``; a failure is raised here, now and every time after."""
        if self._encoding is not None:
            self._encoding.result()

    def _encode(self, frames: np.ndarray, start: int) -> None:
        if self._encoder is None:
            self._encoder = _Encoder(self.video_format, num_frames=start)
            self._begin(self._encoder.header())
        for index, frame in enumerate(frames, start):
            self._append(self._encoder.encode(frame, index))

    def _begin(self, header: bytes) -> None:
        """Write the header into an empty file; otherwise hold it to the file's own."""
        if self._file.tell() == 0:
            self._append(header)
        elif _decoder_parameters(self.path) != _decoder_parameters(io.BytesIO(header)):
            raise OSError(
                "video encoder: this encoder's parameters differ from those the video began with; start a new run"
            )

    def _append(self, data: bytes) -> None:
        start, view = self._file.tell(), memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError:
            self._file.truncate(start)
            raise


class _Encoder:
    """H.264 in fragmented MP4, behind ``num_frames`` frames of the same video; methods return the file's new bytes."""

    def __init__(self, form: VideoFormat, *, num_frames: int) -> None:
        self._form, self._data = form, bytearray()
        self._rate = Fraction(form.fps).limit_denominator(1001)
        # Players want rising fragment numbers, not consecutive ones; frames before it bound the fragments before it.
        options = _MUXER | {
            "fragment_index": str(num_frames + 1),
            "video_track_timescale": str(self._rate.numerator * 1000),
        }
        self._container = cast(OutputContainer, av.open(self, "w", format="mp4", options=options))
        options = _ENCODER | {"crf": str(form.crf), "g": str(max(1, round(form.fps * _GROUP_SECONDS)))}
        options |= {"threads": str(form.threads)} if form.threads else {}
        self._stream = cast(VideoStream, self._container.add_stream("libx264", rate=self._rate, options=options))
        self._stream.height, self._stream.width = form.height * form.scale, form.width * form.scale
        self._stream.pix_fmt = "yuv420p"
        context = self._stream.codec_context
        # 1: BT.709 in all three tables of ISO/IEC 23091-2, and limited range.
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
        self._reformatter = VideoReformatter()

    def write(self, data: bytes) -> int:
        self._data += data
        return len(data)

    def header(self) -> bytes:
        self._container.start_encoding()
        return self._taken()

    def encode(self, frame: np.ndarray, index: int) -> bytes:
        if self._form.scale > 1:
            frame = frame.repeat(self._form.scale, axis=0).repeat(self._form.scale, axis=1)
        picture = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"),
            format="yuv420p",
            dst_colorspace=int(Colorspace.ITU709),
            dst_color_range="MPEG",
            interpolation="BICUBIC",
            threads=1,
        )
        picture.pts, picture.time_base = index, 1 / self._rate
        self._container.mux(self._stream.encode(picture))
        return self._taken()

    def finish(self) -> bytes:
        self._container.mux(self._stream.encode())
        self._container.close()
        return self._taken()

    def _taken(self) -> bytes:
        data, self._data = bytes(self._data), bytearray()
        return data


def count_frames(path: Path) -> int:
    """Count the frames of a video of ours that are wholly in the file, without decoding it; its end may be torn."""
    return sum(1 for _ in _frame_ends(path))


def copy_frames(source: Path, target: Path, *, num_frames: int) -> None:
    """Copy the first frames of a video of ours into a new file, by bytes.

    Raises:
        FileExistsError: If ``target`` exists.
        ValueError: If no fragment of ``source`` ends there: it was never flushed at this number of frames.
    """
    end = _find_end(source, num_frames=num_frames)
    with source.open("rb") as reader, target.open("xb") as writer:
        while data := reader.read(min(1 << 20, end - reader.tell())):
            writer.write(data)
        writer.flush()
        os.fsync(writer.fileno())


def _find_end(path: Path, *, num_frames: int) -> int:
    """File size at which the file holds exactly ``num_frames`` frames."""
    end = total = 0
    for total, (frame_end, is_key) in enumerate(_frame_ends(path), start=1):
        if total == num_frames:
            end = frame_end
        elif total == num_frames + 1:
            if not is_key:
                raise ValueError(f"{path}: no fragment ends behind frame {num_frames}: another run wrote this video")
            return end
    if total < num_frames:
        raise ValueError(f"{path}: holds {total} frames, {num_frames} are needed: the video was cut or replaced")
    return end


def _frame_ends(path: Path) -> Iterator[tuple[int, bool]]:
    """(byte behind the frame, whether it begins a fragment) of every frame that is wholly in the file."""
    size = path.stat().st_size
    # What is behind a torn end is no video; neither is a file that ends in its header.
    with contextlib.suppress(av.FFmpegError, ValueError), _opened(path) as (container, stream):
        for packet in container.demux(stream):
            if not packet.size or packet.pos is None or packet.pos + packet.size > size:
                return
            yield packet.pos + packet.size, packet.is_keyframe


def _decoder_parameters(file: Path | BinaryIO) -> bytes | None:
    """Picture size and H.264 parameter sets."""
    with av.open(file) as container:
        return container.streams.video[0].codec_context.extradata


@dataclass(frozen=True, kw_only=True)
class StreamFacts:
    """Contents of a video file."""

    num_frames: int  # that decoding gives
    fps: float | None  # average; None if the file does not say
    height: int  # pixels, after the rotation the file asks for
    width: int
    codec: str = ""  # as ffmpeg calls it; empty if there is none
    pixels: str = ""  # pixel format of the coded frames, likewise


def probe(path: Path) -> StreamFacts:
    """Look into a video file: one pass over its packets, one decoded frame.

    Codecs whose packets are not frames (VP8, interlaced H.264, ...) are decoded once to count.

    Raises:
        ValueError: If it is no video that ffmpeg can read, holds no frame, or is cut off.
    """
    try:
        with _opened(path) as (container, stream):
            first = next(container.decode(stream), None)
            rate, codec = stream.average_rate, stream.codec_context.name
    except (av.FFmpegError, ValueError) as error:
        reason = error.strerror if isinstance(error, av.FFmpegError) else error
        raise ValueError(f"cannot read {path} as a video: {reason}; re-encode it, e.g. as H.264 in .mp4") from error
    if first is None:
        raise ValueError(f"{path} has no frames: nothing can be decoded")
    num_frames, seconds = _count(path, decode=codec not in _FRAME_PER_PACKET or first.interlaced_frame)
    if num_frames == 0:
        raise ValueError(f"{path} has no frames: nothing can be decoded")
    sides = (first.height, first.width) if first.rotation % 180 == 0 else (first.width, first.height)
    return StreamFacts(
        num_frames=num_frames,
        fps=_nominal(float(rate)) if rate else num_frames / seconds if seconds else None,
        height=sides[0],
        width=sides[1],
        codec=codec,
        pixels=first.format.name,
    )


def read_frames(path: Path, facts: StreamFacts, *, length: int) -> Iterator[np.ndarray]:
    """Decode a file whose ``facts`` are known, in pieces of ``length`` frames; leaving early stops the decoder.

    Yields:
        (F <= length, H, W, 3) uint8 RGB, each in memory of its own. Colours are converted as OpenCV does it.

    Raises:
        ValueError: If the file decodes to fewer or more frames than its packets promised, or with errors.
    """
    num_read, piece = 0, np.empty(0)
    for frame in _decoded(path, length=facts.num_frames):
        at = num_read % length
        if at == 0:
            piece = np.empty((min(length, facts.num_frames - num_read), facts.height, facts.width, 3), np.uint8)
        piece[at] = frame
        num_read += 1
        if at + 1 == len(piece):
            yield piece
    if num_read < facts.num_frames:
        raise ValueError(_other_count(path, f"{num_read}", facts.num_frames))


def _decoded(path: Path, *, length: int) -> Iterator[np.ndarray]:
    reformatter = VideoReformatter()
    try:
        with _opened(path) as (container, stream):
            stream.thread_type = "AUTO"
            for index, frame in enumerate(container.decode(stream)):
                if frame.is_corrupt:
                    raise ValueError(f"{path} is damaged (frame {index} decodes with errors): copy or make it again")
                if index == length:
                    raise ValueError(_other_count(path, f"more than {length}", length))
                # POINT repeats the chroma of subsampled formats, as OpenCV does for 8-bit video.
                picture = reformatter.reformat(frame, format="rgb24", interpolation="POINT").to_ndarray()
                yield np.rot90(picture, frame.rotation // 90)
    except av.FFmpegError as error:
        raise ValueError(f"{path} is damaged ({error.strerror}): copy or make it again") from error


def _other_count(path: Path, found: str, promised: int) -> str:
    return f"{path} decodes to {found} frames where its packets promise {promised}: re-encode it"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The first video stream that is no cover picture; a file that names other files or addresses gets nothing."""
    # "file:" keeps a name with a colon from being read as a protocol.
    with av.open(f"file:{path}", container_options={"protocol_whitelist": "file"}) as container:
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise ValueError("it has no video stream")
        yield container, streams[0]


def _count(path: Path, *, decode: bool) -> tuple[int, float]:
    """Frames, without those that an edit list cuts away, and the seconds they last."""
    num_frames, ticks = 0, 0
    try:
        with _opened(path) as (container, stream):
            if decode:
                durations = [frame.duration or 0 for frame in container.decode(stream)]
                return len(durations), float(sum(durations) * (stream.time_base or 0))
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise ValueError(f"{path} is cut off or damaged after frame {num_frames}: copy or make it again")
                if packet.size and not packet.is_discard:
                    num_frames, ticks = num_frames + 1, ticks + (packet.duration or 0)
            return num_frames, float(ticks * (stream.time_base or 0))
    except av.FFmpegError as error:
        raise ValueError(f"{path} is cut off or damaged after frame {num_frames}: copy or make it again") from error


def _nominal(rate: float) -> float:
    """A stated rate without the rounding of millisecond clocks, which blur 24000/1001."""
    candidates = (round(rate), round(rate) * 1000 / 1001)
    return next((float(nominal) for nominal in candidates if abs(rate - nominal) <= 4e-4 * nominal), rate)


def write_contact_sheet(video: Path, path: Path, *, fps: float, num_tiles: int = 12, num_columns: int = 6) -> None:
    """Write a PNG with at most ``num_tiles`` frames at even times, first and last included, their time below."""
    num_frames = count_frames(video)
    if not num_frames:
        raise ValueError(f"{video} has no frames to show")
    indices = [round(index) for index in np.linspace(0, num_frames - 1, min(num_frames, num_tiles))]
    with iio.imopen(video, "r", plugin="pyav") as reader:
        tiles = [_tile(reader.read(index=index), f"{index / fps:.1f} s") for index in indices]
    (width, height), columns = tiles[0].size, min(num_columns, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (width + _MARGIN) + _MARGIN, rows * (height + _MARGIN) + _MARGIN), "white")
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        sheet.paste(tile, (_MARGIN + column * (width + _MARGIN), _MARGIN + row * (height + _MARGIN)))
    with_temporary(path, lambda temporary: sheet.save(temporary, format="PNG"))


def _tile(frame: np.ndarray, label: str) -> Image.Image:
    image = Image.fromarray(frame)
    # Whole-number nearest enlargement keeps the pixels of a small video sharp; large ones shrink smoothly.
    factor = _TILE_WIDTH // image.width or _TILE_WIDTH / image.width
    how = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    image = image.resize((round(image.width * factor), round(image.height * factor)), how)
    tile = Image.new("RGB", (image.width, image.height + _LABEL_HEIGHT), "white")
    tile.paste(image, (0, 0))
    font = ImageFont.load_default(size=16)
    ImageDraw.Draw(tile).text((image.width // 2, image.height + 3), label, fill="black", font=font, anchor="mt")
    return tile
