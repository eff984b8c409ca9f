"""Videos streamed to metrics in pieces, so that memory does not grow with length."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from longtake.evaluation.metric import Metric, Score, VideoInfo
from longtake.pipelines.video_file import StreamFacts, probe, read_frames

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
PIECE_FRAMES = 16


class VideoSource:
    """A video that can be streamed as often as needed: ``num_frames`` at ``fps``, ``height`` by ``width`` pixels.

    ``encoder`` holds codec and pixel format of a file, and nothing for a folder of frames or an array.
    """

    def __init__(
        self,
        facts: StreamFacts,
        *,
        read: Callable[[int], Iterator[np.ndarray]],
        sha256: Callable[[], str],
        path: Path | None = None,
    ) -> None:
        if facts.fps is None:
            raise ValueError(f"{path} does not state its frames per second: give fps")
        self._read, self._sha256 = read, sha256
        self.num_frames = facts.num_frames
        self.fps = facts.fps
        self.height = facts.height
        self.width = facts.width
        self.encoder = {"codec": facts.codec, "pixels": facts.pixels} if facts.codec else {}
        self.path = path

    @classmethod
    def open(cls, path: Path | str, *, fps: float | None = None) -> "VideoSource":
        """Open a video file, a GIF, or a folder of frames (PNG or JPEG, in natural order of their names).

        ``fps``, frames per second, is needed for a folder. For a file it replaces what the file says.

        Raises:
            ValueError: If it cannot be read, has no frames, states no rate, or frames of a folder differ in size.
        """
        path = Path(path)
        if fps is not None:
            _check_fps(fps)
        if path.is_dir():
            paths = _images(path)
            facts = _folder_facts(path, paths, fps)
            return cls(facts, read=partial(_read_images, paths), sha256=partial(_folder_sha256, paths), path=path)
        if not path.is_file():
            raise ValueError(f"no video at {path}: give a video file or a folder of frames")
        facts = probe(path) if fps is None else replace(probe(path), fps=fps)
        return cls(
            facts,
            read=lambda length: read_frames(path, facts, length=length),
            sha256=partial(_file_sha256, path),
            path=path,
        )

    @classmethod
    def from_array(cls, frames: np.ndarray, fps: float) -> "VideoSource":
        """A video that is in memory: (F, H, W, 3) uint8 RGB.

        Raises:
            ValueError: If shape, dtype or rate are others.
        """
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
            raise ValueError(f"frames are {frames.dtype} {frames.shape}: give uint8 (frames, height, width, 3)")
        _check_fps(fps)
        num_frames, height, width = frames.shape[:3]
        return cls(
            StreamFacts(num_frames=num_frames, fps=fps, height=height, width=width),
            read=lambda length: (frames[start : start + length] for start in range(0, num_frames, length)),
            sha256=lambda: hashlib.sha256(np.ascontiguousarray(frames).data).hexdigest(),
        )

    def pieces(self, length: int = PIECE_FRAMES) -> Iterator[np.ndarray]:
        """The frames in order, from the start at every call; no more than two pieces are in memory.

        Yields:
            (F <= length, H, W, 3) uint8 RGB; not to be written to.

        Raises:
            ValueError: If length is below 1, or the file turns out to be damaged.
        """
        if length < 1:
            raise ValueError(f"length={length}: a piece has at least one frame")
        return self._read(length)

    def sha256(self) -> str:
        """SHA-256 in hex: of a file's bytes, of a folder's file names and bytes, of an array's bytes."""
        return self._sha256()


def measure(source: VideoSource, info: VideoInfo, metrics: Sequence[Metric]) -> dict[str, Score]:
    """Measure a video by all metrics at once: it is decoded a single time.

    Returns:
        {name: score}, one for every spec of every metric.

    Raises:
        ValueError: If two metrics share a name, the video is not as ``info`` says, or a metric refuses it.
        RuntimeError: If a metric fails, or does not give the scores it promises; names metric and video.
    """
    names = Counter(spec.name for metric in metrics for spec in metric.specs)
    if repeated := sorted(name for name, count in names.items() if count > 1):
        raise ValueError(f"metric {repeated[0]!r} is asked for twice: give each once")
    if (source.num_frames, source.height, source.width) != (info.num_frames, info.height, info.width):
        raise ValueError(
            f"video {info.id!r} is said to have {info.num_frames} frames of {info.width}x{info.height}, but "
            f"has {source.num_frames} of {source.width}x{source.height}: correct its manifest line, or make the video "
            "again"
        )
    meters = []
    for metric in metrics:
        with _blamed(metric, info):
            meters.append(metric.start(info))
    for piece in source.pieces():
        for metric, meter in zip(metrics, meters, strict=True):
            with _blamed(metric, info):
                meter.push(piece)
    scores: dict[str, Score] = {}
    for metric, meter in zip(metrics, meters, strict=True):
        with _blamed(metric, info):
            found, promised = meter.finish(), {spec.name for spec in metric.specs}
            if found.keys() != promised:
                raise RuntimeError(
                    f"missing {sorted(promised - found.keys())}, not promised {sorted(found.keys() - promised)}"
                )
        scores |= found
    return scores


@contextmanager
def _blamed(metric: Metric, info: VideoInfo) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        name = metric.specs[0].name if metric.specs else type(metric).__name__
        more = f" and {len(metric.specs) - 1} more" if len(metric.specs) > 1 else ""
        raise kind(f"metric {name}{more} on video {info.id!r}: {error}") from error


def find_videos(folder: Path | str) -> list[Path]:
    """The videos in a folder, in natural order: files by their endings, and folders that hold frames.

    A folder that itself holds frames and no videos is one video. Hidden names are passed over.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder of videos at {folder}")
    entries = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    videos = [entry for entry in entries if _is_video(entry) or _is_frame_folder(entry)]
    if not videos and _images(folder):
        return [folder]
    return sorted(videos, key=_natural_key)


def _natural_key(path: Path) -> tuple[list[tuple[int, str]], str]:
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdigit() else (-1, part.casefold()) for part in parts], path.name


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_sha256(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _folder_facts(folder: Path, paths: Sequence[Path], fps: float | None) -> StreamFacts:
    if not paths:
        raise ValueError(f"{folder} holds no frames: give a folder of PNG or JPEG files")
    if fps is None:
        raise ValueError(f"{folder} is a folder of frames, which has no rate: give fps")
    sizes: dict[tuple[int, int], Path] = {}
    for item in paths:
        with _opened(item) as image:
            sizes.setdefault(image.size, item)
    if len(sizes) > 1:
        (size, first), (other, second) = list(sizes.items())[:2]
        raise ValueError(
            f"frames of {folder} differ in size: {first.name} is {size[0]}x{size[1]}, {second.name} is "
            f"{other[0]}x{other[1]}: make them equal"
        )
    ((width, height),) = sizes
    return StreamFacts(num_frames=len(paths), fps=fps, height=height, width=width)


def _read_images(paths: Sequence[Path], length: int) -> Iterator[np.ndarray]:
    for start in range(0, len(paths), length):
        pictures = []
        for path in paths[start : start + length]:
            with _opened(path) as image:
                pictures.append(np.asarray(image.convert("RGB")))
        yield np.stack(pictures)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except OSError as error:
        raise ValueError(f"cannot read the frame {path}: {error}") from error


def _check_fps(fps: float) -> None:
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps={fps}: give frames per second above 0")


def _images(folder: Path) -> list[Path]:
    entries = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return sorted((entry for entry in entries if entry.suffix.lower() in IMAGE_SUFFIXES), key=_natural_key)


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()


def _is_frame_folder(path: Path) -> bool:
    """A folder with videos in it is a run with a contact sheet, not a video in frames."""
    return path.is_dir() and bool(_images(path)) and not any(_is_video(entry) for entry in path.iterdir())
