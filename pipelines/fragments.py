"""The few parts of the fragmented MP4 format that joining and cutting videos need.

Source: ISO/IEC 14496-12 (boxes moov, moof, mfhd, tfhd, tfdt, trun) as ffmpeg writes them with
``frag_keyframe+empty_moov+default_base_moof``: an init segment (ftyp, moov), then pairs of moof and mdat.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

CONTAINERS = frozenset({b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf"})
HEADER = struct.Struct(">I4s")
COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Box:
    """One box of a file: its type and where it starts and ends, in bytes."""

    kind: bytes
    start: int
    end: int


def count_frames(path: Path) -> int:
    """Count the frames in the complete fragments of a video, without decoding it.

    Args:
        path: A fragmented MP4; its end may be torn.

    Returns:
        Number of frames; 0 for a file without a complete fragment.
    """
    return sum(count for count, _ in _fragment_ends(path))


def find_end(path: Path, *, num_frames: int) -> int:
    """Find the byte behind a number of frames.

    Args:
        path: A fragmented MP4; its end may be torn.
        num_frames: Frames to keep.

    Returns:
        File size in bytes at which the file holds exactly ``num_frames`` frames.

    Raises:
        ValueError: If no fragment ends there, or the file is shorter.
    """
    total = 0
    for count, end in _fragment_ends(path):
        total += count
        if total == num_frames:
            return end
        if total > num_frames:
            raise ValueError(f"{path}: no fragment ends behind frame {num_frames}: another run wrote this video")
    raise ValueError(f"{path}: holds {total} frames, {num_frames} are needed: the video was cut or replaced")


def copy_frames(source: Path, target: Path, *, num_frames: int) -> None:
    """Copy the first frames of a video into a new file, by bytes.

    Args:
        source: A fragmented MP4.
        target: The new file; must not exist.
        num_frames: Frames to copy; a number at which ``source`` was flushed.

    Raises:
        FileExistsError: If ``target`` exists.
        ValueError: If no fragment of ``source`` ends there.
    """
    remaining = find_end(source, num_frames=num_frames)
    with source.open("rb") as reader, target.open("xb") as writer:
        while remaining:
            data = reader.read(min(COPY_BYTES, remaining))
            writer.write(data)
            remaining -= len(data)
        writer.flush()
        os.fsync(writer.fileno())


class FragmentMover:
    """Append an encoder's fragments to a file that may hold earlier ones."""

    def __init__(self, file: BinaryIO, *, num_frames: int) -> None:
        """Prepare to append.

        Args:
            file: Unbuffered binary file, positioned at its end, behind complete fragments only.
            num_frames: Frames the file holds already.
        """
        self._file = file
        self._num_frames = num_frames
        self._num_fragments = 0

    def copy(self, stream: BinaryIO) -> None:
        """Read the encoder's output to its end and append every complete fragment.

        The init segment is written only into an empty file; otherwise it must describe the video as the file's own
        does, or players would decode the new fragments with the wrong parameters.

        Args:
            stream: A fragmented MP4, from its beginning.

        Raises:
            OSError: If the file cannot be written; the file then ends behind a complete fragment.
            ValueError: If the encoder's parameters differ from those of the file.
        """
        init = b""
        fragment = b""
        while box := _read_box(stream):
            kind = box[4:8]
            if kind in (b"ftyp", b"moov"):
                init += box
                if kind == b"moov":
                    self._begin(init)
            elif kind == b"moof":
                fragment = self._moved(bytearray(box))
            elif kind == b"mdat":
                self._append(fragment + box)

    def _begin(self, init: bytes) -> None:
        if self._file.tell() == 0:
            self._append(init)
            return
        with open(self._file.name, "rb") as reader:
            present = reader.read(len(init))
        if _decoder_parameters(present) != _decoder_parameters(init):
            raise ValueError("this encoder's parameters differ from those the video began with; start a new run")

    def _moved(self, moof: bytearray) -> bytes:
        """Shift one fragment's number and start time behind what the file holds."""
        positions = {box.kind: box for box in _walk(moof)}
        (frame_ticks,) = struct.unpack_from(">I", moof, positions[b"tfhd"].start + 16)
        time_at = positions[b"tfdt"].start + 12
        (time,) = struct.unpack_from(">Q", moof, time_at)
        struct.pack_into(">Q", moof, time_at, time + self._num_frames * frame_ticks)
        self._num_fragments += 1
        # Players want rising numbers, not consecutive ones; frames before it are a bound on fragments before it.
        struct.pack_into(">I", moof, positions[b"mfhd"].start + 12, self._num_frames + self._num_fragments)
        return bytes(moof)

    def _append(self, data: bytes) -> None:
        start = self._file.tell()
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError:
            self._file.truncate(start)
            raise


def _fragment_ends(path: Path) -> Iterator[tuple[int, int]]:
    """Yield (frames in the fragment, byte behind it) for every complete fragment."""
    size = path.stat().st_size
    frames = 0
    with path.open("rb") as reader:
        position = 0
        while position + HEADER.size <= size:
            reader.seek(position)
            length, kind = HEADER.unpack(reader.read(HEADER.size))
            if length < HEADER.size or position + length > size:
                return
            if kind == b"moof":
                reader.seek(position)
                frames = _num_samples(reader.read(length))
            position += length
            if kind == b"mdat":
                yield frames, position


def _num_samples(moof: bytes) -> int:
    return sum(struct.unpack_from(">I", moof, box.start + 12)[0] for box in _walk(moof) if box.kind == b"trun")


def _read_box(stream: BinaryIO) -> bytes:
    """Read one whole box; nothing at the end of the stream or when the encoder was cut off inside a box."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return b""
    (length, _) = HEADER.unpack(header)
    body = stream.read(length - HEADER.size)
    return header + body if len(body) == length - HEADER.size else b""


def _walk(data: bytes | bytearray, start: int = 0, end: int | None = None) -> Iterator[Box]:
    """Yield every box inside ``data``, containers and contents."""
    end = len(data) if end is None else end
    while start + HEADER.size <= end:
        length, kind = HEADER.unpack_from(data, start)
        yield Box(kind, start, start + length)
        if kind in CONTAINERS:
            yield from _walk(data, start + HEADER.size, start + length)
        start += max(length, HEADER.size)


def _decoder_parameters(init: bytes) -> bytes:
    """The sample description: picture size and H.264 parameter sets."""
    for box in _walk(init):
        if box.kind == b"stsd":
            return init[box.start : box.end]
    return b""
