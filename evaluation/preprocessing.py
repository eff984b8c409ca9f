"""Frame sampling and image transforms in front of the networks of the metrics."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


def clip_ranges(num_frames: int, fps: float, seconds: float = 2) -> list[tuple[int, int]]:
    """Cut a video into clips as VBench-Long does.

    A clip has ``int(fps) * seconds`` frames. What is left at the end becomes a clip of the same length that starts
    in the clip before; a video shorter than one clip is one clip.

    Args:
        num_frames: Of the video, at least 1.
        fps: Frames per second, at least 1; its fraction is dropped.
        seconds: Length of a clip, a whole number.

    Returns:
        (first frame, number of frames) of each clip, in order.

    Raises:
        ValueError: If a clip would have no frame, or seconds is not a whole number.

    Source: VBench-Long, ``split_video_into_clips`` (commit 45e79ec).
    """
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames}: a video has at least one frame")
    if seconds != int(seconds) or seconds < 1:
        raise ValueError(f"seconds={seconds}: VBench-Long's clips last whole seconds: use 1 or more")
    length = int(fps) * int(seconds)
    if length < 1:
        raise ValueError(f"fps={fps} gives clips without frames: use a video of at least 1 frame per second")
    if num_frames < length:
        return [(0, num_frames)]
    clips = [(start, length) for start in range(0, num_frames - length + 1, length)]
    if num_frames % length:
        clips.append((num_frames - length, length))
    return clips


def middle(num_samples: int, num_frames: int) -> list[int]:
    """The middle frames of so many equal stretches; the last is repeated where the video has fewer frames.

    Args:
        num_samples: Frames wanted, at least 1.
        num_frames: Of the video, at least 1.

    Returns:
        ``num_samples`` frame indices in ascending order.

    Raises:
        ValueError: If either is below 1.

    Source: VBench, ``get_frame_indices(sample="middle")``.
    """
    if num_samples < 1 or num_frames < 1:
        raise ValueError(f"num_samples={num_samples} of num_frames={num_frames}: both are at least 1")
    edges = np.linspace(0, num_frames, min(num_samples, num_frames) + 1).astype(int)
    indices = [int(start + end - 1) // 2 for start, end in zip(edges[:-1], edges[1:], strict=True)]
    return indices + indices[-1:] * (num_samples - len(indices))


def stride_for_8fps(fps: float) -> int:
    """Every how many frames to look for about eight frames a second, as VBench's dynamic degree does.

    Rounds a half to the even neighbour, as VBench does: 20 frames per second give 2, not 3.

    Raises:
        ValueError: If fps is not positive.
    """
    if not fps > 0:
        raise ValueError(f"fps={fps}: frames per second are above 0")
    return max(1, round(fps / 8))


def _first_last(num_frames: int, fps: float, seconds: float) -> tuple[tuple[int, int], tuple[int, int]]:
    """The first and the last so many seconds, as (first frame, number of frames).

    Raises:
        ValueError: If the two would overlap.
    """
    length = max(1, round(seconds * fps))
    if 2 * length > num_frames:
        raise ValueError(
            f"a video of {num_frames / fps:g} s has no first and last {seconds:g} s apart: "
            f"use at least {2 * seconds:g} s of video, or fewer seconds"
        )
    return (0, length), (num_frames - length, length)


def percent(num_frames: int, share: float) -> tuple[tuple[int, int], tuple[int, int]]:
    """The first and the last so many percent of a video, at least a frame each, as (first frame, number of frames).

    Args:
        num_frames: Of the video.
        share: In percent, above 0, at most 50.

    Raises:
        ValueError: If the share is outside that, or the video has fewer than two frames.
    """
    if not 0 < share <= 50:
        raise ValueError(f"share={share} %: use more than 0 and at most 50, or the two ends overlap")
    if num_frames < 2:
        raise ValueError(f"num_frames={num_frames}: two ends need at least 2 frames")
    length = max(1, int(num_frames * share / 100))
    return (0, length), (num_frames - length, length)


def _equal_parts(num_frames: int, num_parts: int) -> list[tuple[int, int]]:
    """Cut a video into parts whose lengths differ by a frame at most, as (first frame, number of frames).

    Raises:
        ValueError: If there are fewer frames than parts.
    """
    if not 1 <= num_parts <= num_frames:
        raise ValueError(f"num_parts={num_parts} of num_frames={num_frames}: use 1 to num_frames parts")
    edges = [num_frames * part // num_parts for part in range(num_parts + 1)]
    return [(start, end - start) for start, end in zip(edges[:-1], edges[1:], strict=True)]


Loader = Literal["float", "uint8"]
"""How VBench reads the video before a transform."""
MusiqMode = Literal["longer", "shorter", "shorter_centercrop", "None"]
"""VBench's ``imaging_quality_preprocessing_mode``; its default is ``longer``."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MUSIQ_SIDE = 512


def to_tensor(frames: np.ndarray) -> Tensor:
    """(F, H, W, 3) uint8 -> (F, 3, H, W) float32 in 0..255.

    Raises:
        ValueError: If shape or dtype are others.
    """
    _check(frames)
    return torch.from_numpy(frames.transpose(0, 3, 1, 2).copy()).float()


def dino_transform(frames: np.ndarray, *, side: int = 224, loader: Loader = "float") -> Tensor:
    """Shorter side to ``side`` (bilinear), no crop, ImageNet's mean and deviation: for DINO."""

    def transform(image: Tensor) -> Tensor:
        image = _shorter_side(image, side, mode="bilinear", loader=loader)
        return _normalise(image, IMAGENET_MEAN, IMAGENET_STD)

    return _each(frames, transform)


def clip_transform(frames: np.ndarray, *, side: int = 224, loader: Loader = "float") -> Tensor:
    """Shorter side to ``side`` (bicubic), centre crop, CLIP's mean and deviation.

    For CLIP through the ``float`` loader, for ViCLIP through ``uint8``.
    """

    def transform(image: Tensor) -> Tensor:
        image = _shorter_side(image, side, mode="bicubic", loader=loader)
        return _normalise(_centre_crop(image, side), CLIP_MEAN, CLIP_STD)

    return _each(frames, transform)


def _umt_transform(frames: np.ndarray, *, loader: Loader = "uint8") -> Tensor:
    """Shorter side to 256 (bilinear), centre crop of 224, ImageNet's mean and deviation: for UMT."""

    def transform(image: Tensor) -> Tensor:
        image = _shorter_side(image, 256, mode="bilinear", loader=loader)
        return _normalise(_centre_crop(image, 224), IMAGENET_MEAN, IMAGENET_STD)

    return _each(frames, transform)


def dinov2_transform(
    frames: np.ndarray, *, side: int = 224, loader: Loader = "float", antialias: bool = True
) -> Tensor:
    """Shorter side to 256 (bicubic), centre crop, ImageNet's mean and deviation: for DINOv2 between clips.

    VBench-Long leaves ``antialias`` to torchvision, where it is on since 0.17 and was off for tensors before.
    """

    def transform(image: Tensor) -> Tensor:
        image = _shorter_side(image, 256, mode="bicubic", loader=loader, antialias=antialias)
        return _normalise(_centre_crop(image, side), IMAGENET_MEAN, IMAGENET_STD)

    return _each(frames, transform)


def dreamsim_transform(
    frames: np.ndarray, *, side: int = 224, loader: Loader = "float", antialias: bool = True
) -> Tensor:
    """Both sides to ``side`` (bicubic), in about 0..1: for DreamSim between clips; ``antialias`` as for DINOv2."""

    def transform(image: Tensor) -> Tensor:
        return _resize(image, (side, side), mode="bicubic", loader=loader, antialias=antialias) / 255.0

    return _each(frames, transform)


def musiq_transform(frames: np.ndarray, *, mode: MusiqMode = "longer", loader: Loader = "float") -> Tensor:
    """Frames in 0..1, made smaller where the longer (or shorter) side is over 512: for MUSIQ.

    Raises:
        ValueError: If the mode is unknown.
    """
    if mode not in ("longer", "shorter", "shorter_centercrop", "None"):
        raise ValueError(f"mode={mode!r}: use longer, shorter, shorter_centercrop or None")

    def transform(image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        side = max(height, width) if mode == "longer" else min(height, width)
        if mode == "None" or side <= MUSIQ_SIDE:
            return image / 255.0
        scale = MUSIQ_SIDE / side
        image = _resize(image, (int(scale * height), int(scale * width)), mode="bilinear", loader=loader)
        return (_centre_crop(image, MUSIQ_SIDE) if mode == "shorter_centercrop" else image) / 255.0

    return _each(frames, transform)


def pad_to_multiple(images: Tensor, multiple: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Repeat the edges until both sides are multiples, the odd pixel at the right and at the bottom.

    RAFT takes multiples of 8, AMT of 16.

    Args:
        images: (B, C, H, W).
        multiple: Of pixels, at least 1.

    Returns:
        (B, C, H', W') and the padding (left, right, top, bottom), which :func:`unpad` takes away again.

    Raises:
        ValueError: If the multiple is below 1.
    """
    if multiple < 1:
        raise ValueError(f"multiple={multiple}: use 1 or more pixels")
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
    _check(frames)
    return torch.cat([transform(to_tensor(frame[None])) for frame in frames])


def _check(frames: np.ndarray) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}: give uint8 (frames, height, width, 3)")


def _shorter_side(images: Tensor, side: int, *, mode: str, loader: Loader, antialias: bool = False) -> Tensor:
    height, width = images.shape[-2:]
    # The longer side is cut, not rounded, and computed from whole numbers, as torchvision does.
    size = (side, int(side * width / height)) if height <= width else (int(side * height / width), side)
    return _resize(images, size, mode=mode, loader=loader, antialias=antialias)


def _resize(images: Tensor, size: tuple[int, int], *, mode: str, loader: Loader, antialias: bool = False) -> Tensor:
    if loader not in ("float", "uint8"):
        raise ValueError(f"loader={loader!r}: use float or uint8")
    if size == tuple(images.shape[-2:]):
        return images
    images = functional.interpolate(images, size=size, mode=mode, align_corners=False, antialias=antialias)
    return images.clamp_(0.0, 255.0).round_() if loader == "uint8" else images


def _centre_crop(images: Tensor, side: int) -> Tensor:
    top, left = (int(round((length - side) / 2.0)) for length in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


def _normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    shape = (1, 3, 1, 1)
    return (images / 255.0 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
