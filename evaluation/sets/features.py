"""Features of a video's frames, kept on disk while the videos stream by, for measures of the whole set."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from longtake.evaluation.backbones.base import FrameEncoder
from longtake.evaluation.metric import MetricSpec, Score, VideoInfo
from longtake.evaluation.sampling import middle

NUM_FRAMES = 32
"""Of each video, evenly spaced: as many per video for all, and even, which STREAM needs."""
_FRAMES_AT_ONCE = 8


class FeatureCollector:
    """A metric without numbers of its own: writes ``FOLDER/ID.npy``, (frames, dimensions) float32, for each video.

    Args:
        encoder: Of frames.
        transform: From frames (F, H, W, 3) uint8 to what the encoder takes.
        folder: Made if it is missing.
        num_frames: Per video, spread evenly over it.
    """

    specs: tuple[MetricSpec, ...] = ()

    def __init__(
        self,
        encoder: FrameEncoder,
        transform: Callable[[np.ndarray], torch.Tensor],
        folder: Path,
        *,
        num_frames: int = NUM_FRAMES,
    ) -> None:
        if num_frames < 4 or num_frames % 2:
            raise ValueError(f"num_frames={num_frames} features per video: use an even number, 4 or more.")
        self.encoder, self.transform, self.folder, self.num_frames = encoder, transform, folder, num_frames

    def start(self, video: VideoInfo) -> "FeatureMeter":
        """A meter for one video.

        Raises:
            ValueError: If the video has fewer frames than are kept.
        """
        if video.num_frames < self.num_frames:
            raise ValueError(
                f"video {video.id!r} has {video.num_frames} frames, and num_frames={self.num_frames} are to be kept: "
                "keep fewer."
            )
        return FeatureMeter(self, video)


class FeatureMeter:
    """Encodes the wanted frames of one video and writes them when it ends."""

    def __init__(self, collector: FeatureCollector, video: VideoInfo) -> None:
        self._collector, self._video = collector, video
        self._wanted = middle(collector.num_frames, video.num_frames)
        self._waiting: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []
        self._position = 0

    def push(self, frames: np.ndarray) -> None:
        """Take the next frames: (F, H, W, 3) uint8 RGB."""
        end = self._position + len(frames)
        taken = len(self._waiting) + sum(map(len, self._rows))
        for index in self._wanted[taken:]:
            if index >= end:
                break
            self._waiting.append(frames[index - self._position].copy())
            if len(self._waiting) == _FRAMES_AT_ONCE:
                self._encode()
        self._position = end

    def finish(self) -> Mapping[str, Score]:
        """Write the features; no scores."""
        self._encode()
        write_features(self._collector.folder, self._video.id, np.concatenate(self._rows))
        return {}

    def _encode(self) -> None:
        if self._waiting:
            with torch.no_grad():
                encoded = self._collector.encoder.encode(self._collector.transform(np.stack(self._waiting)))
            self._rows.append(encoded.float().cpu().numpy())
            self._waiting.clear()


def write_features(folder: Path, video_id: str, features: np.ndarray) -> Path:
    """Write one video's features, all of them or nothing: (frames, dimensions) float32."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{video_id}.npy"
    temporary = folder / f".{video_id}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            np.save(file, features.astype(np.float32), allow_pickle=False)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_features(folder: Path) -> dict[str, np.ndarray]:
    """Read what a collector wrote.

    Args:
        folder: Of ``ID.npy`` files.

    Returns:
        {id: (frames, dimensions) float32}, sorted by id; all of one shape.

    Raises:
        ValueError: If there are none, one cannot be read, or shapes differ.
    """
    features: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.npy")):
        try:
            features[path.stem] = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read the features {path}: {error}") from error
    if not features:
        raise ValueError(f"{folder} holds no features (*.npy): collect them first, with a FeatureCollector.")
    shapes = {array.shape for array in features.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        raise ValueError(
            f"features in {folder} have shapes {sorted(shapes)}: all videos need (frames, dimensions), the same."
        )
    return features
