"""Frame sampling and image transforms in front of the networks of the metrics."""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


def clip_ranges(num_frames: int, fps: float, seconds: int = 2) -> list[tuple[int, int]]:
    """Cut a video into clips as VBench-Long does: (first frame, number of frames) of each, in order.

    A clip has ``int(fps) * seconds`` frames. What is left at the end becomes a clip of the same length that starts
    in the clip before; a video shorter than one clip is one clip. ``fps`` is at least 1; its fraction is dropped.

    Source: VBench-Long, ``split_video_into_clips`` (commit 45e79ec).
    """
    length = int(fps) * seconds
    if num_frames < length:
        return [(0, num_frames)]
    clips = [(start, length) for start in range(0, num_frames - length + 1, length)]
    if num_frames % length:
        clips.append((num_frames - length, length))
    return clips


def middle(num_samples: int, num_frames: int) -> list[int]:
    """The middle frames of so many equal stretches; the last is repeated where the video has fewer frames.

    Source: VBench, ``get_frame_indices(sample="middle")``.
    """
    edges = np.linspace(0, num_frames, min(num_samples, num_frames) + 1).astype(int)
    indices = [int(start + end - 1) // 2 for start, end in pairwise(edges)]
    return indices + indices[-1:] * (num_samples - len(indices))


def stride_for_8fps(fps: float) -> int:
    """Stride to look at about eight frames a second, as VBench's dynamic degree does.

    Rounds a half to the even neighbour, as VBench does: 20 frames per second give 2, not 3.
    """
    return max(1, round(fps / 8))


Loader = Literal["float", "uint8"]  # VBench's way to read the video before a transform
MusiqMode = Literal["longer", "shorter", "shorter_centercrop", "None"]
"""VBench's ``imaging_quality_preprocessing_mode``; its default is ``longer``."""

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean and deviation of the channels
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: Statistics = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
MUSIQ_SIDE = 512


def to_tensor(frames: np.ndarray) -> Tensor:
    """(F, H, W, 3) uint8 -> (F, 3, H, W) float32 in 0..255; ValueError for others."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}: give uint8 (frames, height, width, 3)")
    return torch.from_numpy(frames.transpose(0, 3, 1, 2).copy()).float()


def dino_transform(frames: np.ndarray, *, side: int = 224) -> Tensor:
    """Shorter side to ``side`` (bilinear), no crop, ImageNet's mean and deviation: for DINO."""
    return _each(frames, lambda image: _normalise(_shorter_side(image, side, mode="bilinear"), IMAGENET))


def clip_transform(frames: np.ndarray, *, side: int = 224, loader: Loader = "float") -> Tensor:
    """Shorter side to ``side`` (bicubic), crop, CLIP's mean and deviation: loader ``uint8`` for ViCLIP."""

    def transform(image: Tensor) -> Tensor:
        image = _shorter_side(image, side, mode="bicubic")
        image = image.clamp_(0.0, 255.0).round_() if loader == "uint8" else image
        return _normalise(_centre_crop(image, side), CLIP)

    return _each(frames, transform)


def dinov2_transform(frames: np.ndarray, *, side: int = 224) -> Tensor:
    """Shorter side to 256 (bicubic), centre crop, ImageNet's mean and deviation: for DINOv2 between clips.

    VBench-Long leaves antialiasing to torchvision, where it is on since 0.17 and was off for tensors before.
    """

    def transform(image: Tensor) -> Tensor:
        return _normalise(_centre_crop(_shorter_side(image, 256, mode="bicubic", antialias=True), side), IMAGENET)

    return _each(frames, transform)


def dreamsim_transform(frames: np.ndarray, *, side: int = 224) -> Tensor:
    """Both sides to ``side`` (bicubic), in about 0..1: for DreamSim between clips; antialiasing as for DINOv2."""
    return _each(frames, lambda image: _resize(image, (side, side), mode="bicubic", antialias=True) / 255.0)


def musiq_transform(frames: np.ndarray, *, mode: MusiqMode = "longer") -> Tensor:
    """Frames in 0..1, made smaller where the longer (or shorter) side is over 512: for MUSIQ."""

    def transform(image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        side = max(height, width) if mode == "longer" else min(height, width)
        if mode == "None" or side <= MUSIQ_SIDE:
            return image / 255.0
        scale = MUSIQ_SIDE / side
        image = _resize(image, (int(scale * height), int(scale * width)), mode="bilinear")
        return (_centre_crop(image, MUSIQ_SIDE) if mode == "shorter_centercrop" else image) / 255.0

    return _each(frames, transform)


def pad_to_multiple(images: Tensor, multiple: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Repeat the edges until both sides are multiples, the odd pixel at the right and at the bottom.

    Args:
        images: (B, C, H, W).
        multiple: Of pixels; RAFT takes 8, AMT 16.

    Returns:
        (B, C, H', W') and the padding (left, right, top, bottom), which :func:`unpad` takes away again.
    """
    down, across = -images.shape[-2] % multiple, -images.shape[-1] % multiple
    padding = (across // 2, across - across // 2, down // 2, down - down // 2)
    return (functional.pad(images, padding, mode="replicate") if any(padding) else images), padding


def unpad(images: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """Take the padding (left, right, top, bottom) from (..., H', W')."""
    left, right, top, bottom = padding
    height, width = images.shape[-2:]
    return images[..., top : height - bottom, left : width - right]


def _each(frames: np.ndarray, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply to one frame after the other: each stays in the processor's cache, and memory is one frame's."""
    return torch.cat([transform(to_tensor(frame[None])) for frame in frames])


def _shorter_side(images: Tensor, side: int, *, mode: str, antialias: bool = False) -> Tensor:
    height, width = images.shape[-2:]
    # The longer side is cut, not rounded, and computed from whole numbers, as torchvision does.
    size = (side, int(side * width / height)) if height <= width else (int(side * height / width), side)
    return _resize(images, size, mode=mode, antialias=antialias)


def _resize(images: Tensor, size: tuple[int, int], *, mode: str, antialias: bool = False) -> Tensor:
    if size == tuple(images.shape[-2:]):
        return images
    return functional.interpolate(images, size=size, mode=mode, align_corners=False, antialias=antialias)


def _centre_crop(images: Tensor, side: int) -> Tensor:
    top, left = (int(round((length - side) / 2.0)) for length in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


def _normalise(images: Tensor, statistics: Statistics) -> Tensor:
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in statistics)
    return (images / 255.0 - mean) / deviation
