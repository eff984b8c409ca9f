"""Video files to RGB frames by ffmpeg, a few at a time; what a file holds is known before it is decoded."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, BinaryIO

import imageio_ffmpeg
import numpy as np

# In a container of these, a packet is a frame: counting packets is enough, and hundreds of times faster than decoding.
_FRAME_PER_PACKET = {"av1", "ffv1", "gif", "h264", "hevc", "mjpeg", "png", "prores", "rawvideo", "vp9"}
# These may split an interlaced frame into two packets, and say "progressive" when they do not.
_MAYBE_FIELDS = {"h264", "hevc"}
# Flags of ffmpeg's packets.
_CORRUPT, _DISCARDED = 2, 4
# What ffmpeg says when it had to make up a part of a picture.
_CONCEALED = re.compile(r"error while decoding|error submitting packet|corrupt", re.IGNORECASE)
_THREADS = 4
_PIPE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class StreamFacts:
    """What a video file holds.

    Attributes:
        num_frames: That decoding gives.
        fps: Average frames per second; None if the file does not say.
        height: Pixels, after the rotation the file asks for.
        width: Pixels, after the rotation the file asks for.
        codec: As ffmpeg calls it; empty if there is none.
        pixels: Pixel format of the coded frames, likewise.
    """

    num_frames: int
    fps: float | None
    height: int
    width: int
    codec: str = ""
    pixels: str = ""


def probe(path: Path) -> StreamFacts:
    """Look into a video file: one pass over its packets, one decoded frame.

    Codecs whose packets are not frames (VP8, interlaced H.264, ...) are decoded once to count.

    Raises:
        ValueError: If it is no video that ffmpeg can read, holds no frame, or is cut off.
    """
    packets = ["-map", "0:V:0", "-c", "copy", "-f", "framecrc", "pipe:1"]
    first = ["-map", "0:V:0", "-frames:v", "1", "-fps_mode", "passthrough", "-c:v", "rawvideo", "-pix_fmt", "rgb24"]
    table, log = _run(path, [*packets, *first, "-f", "null", "-"])
    stream = re.search(r"^ +Stream #0:0.*?: Video: (\w+).*$", log.partition("Output #0")[2], re.MULTILINE)
    size = re.search(r"^ +Stream #1:0.*?: Video: rawvideo .*?, (\d+)x(\d+)[, ]", log, re.MULTILINE)
    if stream is None or size is None:
        raise ValueError(f"cannot read {path} as a video: {_reason(log)}; re-encode it, e.g. as H.264 in .mp4")
    codec, line = stream[1], stream[0]
    if codec not in _FRAME_PER_PACKET or (codec in _MAYBE_FIELDS and "progressive" not in line):
        decoded = ["-map", "0:V:0", "-fps_mode", "passthrough", "-f", "framecrc", "pipe:1"]
        table, log = _run(path, decoded)
    num_frames, seconds, is_cut_off = _count(table)
    if num_frames == 0:
        raise ValueError(f"{path} has no frames: {_reason(log)}")
    if is_cut_off:
        raise ValueError(f"{path} is cut off or damaged after frame {num_frames}: copy or make it again")
    pixels = re.search(r"Video: \w+(?: \([^)]*\))*, (\w+)", line)
    return StreamFacts(
        num_frames=num_frames,
        fps=_rate(line, num_frames, seconds),
        height=int(size[2]),
        width=int(size[1]),
        codec=codec,
        pixels=pixels[1] if pixels else "",
    )


def read_frames(path: Path, facts: StreamFacts, *, length: int) -> Iterator[np.ndarray]:
    """Decode a file, piece by piece; leaving early stops the decoder.

    Args:
        path: The file.
        facts: What :func:`probe` said of it.
        length: Frames per piece; the last may be shorter.

    Yields:
        (F <= length, H, W, 3) uint8 RGB, each in memory of its own. Colours are converted as OpenCV does it.

    Raises:
        ValueError: If the file decodes to fewer or more frames than its packets promised, or with errors.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [*_command(path, level="error"), *("-map", "0:V:0", "-fps_mode", "passthrough"),
             *("-c:v", "rawvideo", "-pix_fmt", "rgb24", "-f", "rawvideo", "pipe:1")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            bufsize=0,
            pipesize=_PIPE_BYTES,
        )  # fmt: skip
        try:
            for start in range(0, facts.num_frames, length):
                shape = (min(length, facts.num_frames - start), facts.height, facts.width, 3)
                yield _read_piece(process.stdout, shape, path, start, facts, errors)
            if process.stdout.read(1):
                raise ValueError(_other_count(path, f"more than {facts.num_frames}", facts))
            log = _text(errors)
            if _CONCEALED.search(log):
                raise ValueError(f"{path} is damaged ({_reason(log)}): copy or make it again")
        finally:
            process.kill()
            process.stdout.close()
            process.wait()


def _read_piece(
    pipe: BinaryIO, shape: tuple[int, ...], path: Path, start: int, facts: StreamFacts, errors: IO[bytes]
) -> np.ndarray:
    piece = np.empty(shape, np.uint8)
    rest = memoryview(piece).cast("B")
    while rest:
        count = pipe.readinto(rest)
        if not count:
            missing = -(-len(rest) // (piece.nbytes // len(piece)))
            found = start + len(piece) - missing
            raise ValueError(_other_count(path, f"{found}", facts, _reason(_text(errors))))
        rest = rest[count:]
    return piece


def _text(errors: IO[bytes]) -> str:
    errors.seek(0)
    return errors.read().decode(errors="replace")


def _other_count(path: Path, found: str, facts: StreamFacts, reason: str = "") -> str:
    why = f" ({reason})" if reason else ""
    return f"{path} decodes to {found} frames where its packets promise {facts.num_frames}{why}: re-encode it"


def _command(path: Path, *, level: str) -> list[str]:
    """ffmpeg on one local file: a file that names other files or addresses gets nothing."""
    # "file:" keeps a name with a colon from being read as a protocol.
    options = ["-hide_banner", "-nostdin", "-nostats", "-loglevel", level, "-threads", str(_THREADS)]
    return [
        *(imageio_ffmpeg.get_ffmpeg_exe(), *options),
        *("-protocol_whitelist", "file,pipe", "-i", f"file:{path}"),
    ]


def _run(path: Path, arguments: list[str]) -> tuple[str, str]:
    """What ffmpeg writes: the table on its output and its log."""
    done = subprocess.run(
        [*_command(path, level="info"), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    return done.stdout, done.stderr


def _count(table: str) -> tuple[int, float, bool]:
    """Of a framecrc table: frames, without what an edit list cuts away; seconds they last; is one of them broken."""
    base = re.search(r"^#tb 0: (\d+/\d+)$", table, re.MULTILINE)
    num_frames = ticks = 0
    is_broken = False
    for line in table.splitlines():
        # stream, dts, pts, duration, size, checksum, perhaps F=flags
        cells = [cell.strip() for cell in line.split(",")]
        if line.startswith("#") or len(cells) < 6:
            continue
        flags = next((int(cell[2:], 16) for cell in cells[6:] if cell.startswith("F=")), 0)
        is_broken |= bool(flags & _CORRUPT)
        if not flags & _DISCARDED:
            num_frames += 1
            ticks += int(cells[3])
    return num_frames, float(ticks * Fraction(base[1])) if base else 0.0, is_broken


def _rate(line: str, num_frames: int, seconds: float) -> float | None:
    """Average rate: as the file states it, with the digits that its log cuts off taken from the frames' durations."""
    stated = re.search(r"([\d.]+)(k?) fps", line)
    measured = num_frames / seconds if seconds > 0 else None
    if stated is None:
        return measured
    rate = float(stated[1]) * (1000 if stated[2] else 1)
    if measured is not None and abs(measured - rate) <= 0.006:
        rate = measured
    for nominal in (round(rate), round(rate) * 1000 / 1001):
        # Millisecond clocks and two printed digits blur 24000/1001; the nearest other rate is 1 in 1000 away.
        if abs(rate - nominal) <= 4e-4 * nominal:
            return float(nominal)
    return rate or measured


def _reason(log: str) -> str:
    """The line of ffmpeg's log that says what went wrong."""
    lines = [re.sub(r"^\[[^\]]*\] ", "", line).strip() for line in log.splitlines() if line.strip()]
    opening = [line.partition("Error opening input: ")[2] for line in lines if "Error opening input: " in line]
    if opening:
        return opening[0].rstrip(".")
    if any("matches no streams" in line for line in lines):
        return "it has no video stream"
    faults = [line for line in lines if re.search(r"error|invalid|fail", line, re.IGNORECASE)]
    return (faults or ["nothing can be decoded"])[0].rstrip(".")
