"""Conditioning: images, clips or latents that a video continues, encoded as the rollout takes them in.

One rule brings a clip to the model's frame rate: frames are counted back from its last one, and every moment of the
model's takes the clip's nearest frame. One rule brings it to the model's size: PIL enlarges or shrinks (Lanczos) until
the picture covers it, and the middle is kept.
"""

import logging
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor
from PIL import Image, ImageOps
from torch import Tensor

from longtake.configs.families import PIXELS_PER_LATENT, ModelFamily
from longtake.models import StreamingEncoder, VaePixels
from longtake.pipelines.video_file import probe, read_frames

logger = logging.getLogger(__name__)

Frame = Image.Image | Tensor  # an RGB picture, or (3, height, width) float32 in [0, 1]

_PIECE_FRAMES = 8
# A crop that keeps less of the picture than this shows something else.
_LEAST_KEPT = 0.1


class ConditioningLatents:
    """Latents that a rollout continues, as it takes them: from the first frame on, a block at a time, each once.

    These are given as (batch, frames, channels, height, width), normalised; others are made when they are taken.
    """

    def __init__(self, latents: Tensor) -> None:
        self.num_frames = latents.shape[1]
        self._rest = latents

    def take(self, num_frames: int) -> Tensor:
        """Return the next latent frames."""
        taken, self._rest = self._rest[:, :num_frames], self._rest[:, num_frames:]
        return taken


class _EncodedClips(ConditioningLatents):
    """Clips of equal length as conditioning latents: read, resized and encoded a block at a time."""

    def __init__(self, clips: Sequence["Clip"], cuts: Sequence["Cut"], *, encoder: "ClipEncoder") -> None:
        self.num_frames = cuts[0].num_latent_frames
        self._settings = encoder
        self._frames = [clip.take(cut.indices) for clip, cut in zip(clips, cuts, strict=True)]
        self._encoder = StreamingEncoder(encoder.vae)
        self._pixels = VaePixels(encoder.vae)

    @torch.no_grad()
    def take(self, num_frames: int) -> Tensor:
        s = self._settings
        num_pictures = PIXELS_PER_LATENT * num_frames - (0 if self._encoder.num_frames else PIXELS_PER_LATENT - 1)
        pictures = [list(islice(frames, num_pictures)) for frames in self._frames]
        if any(len(own) != num_pictures for own in pictures):
            raise ValueError("the clip has fewer frames than when it was opened: was it replaced?")
        videos = torch.stack([_to_pixels(own, s.processor, height=s.height, width=s.width) for own in pictures])
        latents = self._encoder.encode(videos.to(s.vae.device, s.vae.dtype))
        if self._encoder.num_frames == self.num_frames:
            for frames in self._frames:
                # To its end: that is where a damaged file is found out.
                next(frames, None)
        return self._pixels.normalise(latents).expand(s.batch_size, -1, -1, -1, -1)


@dataclass(frozen=True, kw_only=True)
class ClipEncoder:
    """Target of conditioning frames: the model's VAE, the video's size in pixels and samples, and its blocks."""

    vae: AutoencoderKLWan
    processor: VideoProcessor
    height: int
    width: int
    batch_size: int
    family: ModelFamily

    def conditioning(self, given: Mapping[str, Any]) -> ConditioningLatents | None:
        """Turn ``image``, ``video`` or ``video_latents`` of ``VideoSettings`` into conditioning latents.

        Raises:
            ValueError: If several are given, the model starts from none of the kind, or a clip is too short.
        """
        kinds = [name for name, value in given.items() if value is not None]
        if not kinds:
            return None
        if len(kinds) > 1:
            raise ValueError(f"{' and '.join(kinds)} are given: a video goes on from one of them.")
        (kind,) = kinds
        if kind == "video_latents":
            return self._from_latents(given[kind])
        clips = make_stills(given[kind]) if kind == "image" else make_clips(given[kind])
        if len(clips) not in (1, self.batch_size):
            raise ValueError(f"{len(clips)} {kind}s for {self.batch_size} samples: give one, or one per sample.")
        cuts = [plan_cut(clip, kind, family=self.family, height=self.height, width=self.width) for clip in clips]
        lengths = sorted({cut.num_latent_frames for cut in cuts})
        if len(lengths) > 1:
            raise ValueError(
                f"the videos fill {lengths} latent frames: give equally long ones, or make them one by one."
            )
        if left_out := cuts[0].num_left_out:
            seconds = left_out / self.family.fps
            logger.warning(
                "%d frames (%.2f s) at the beginning of the clip fill no block and are left out.", left_out, seconds
            )
        return _EncodedClips(clips, cuts, encoder=self)

    def _from_latents(self, latents: Tensor | ConditioningLatents) -> ConditioningLatents:
        if not isinstance(latents, Tensor):
            return latents
        ratio = self.vae.config["scale_factor_spatial"]
        wanted = (self.vae.config["z_dim"], self.height // ratio, self.width // ratio)
        shape = tuple(latents.shape)
        if len(shape) != 5 or shape[0] not in (1, self.batch_size) or (shape[1], *shape[3:]) != wanted:
            expected = f"({self.batch_size}, {wanted[0]}, frames, {wanted[1]}, {wanted[2]})"
            raise ValueError(f"video_latents has shape {shape}, expected {expected}.")
        return ConditioningLatents(latents.transpose(1, 2).expand(self.batch_size, -1, -1, -1, -1))


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Frames in order, not read yet."""

    num_frames: int  # 1 or more
    height: int  # pixels
    width: int
    read: Callable[[], Generator[Frame]]  # starts over from the first frame at every call
    fps: float | None = None  # None: the model's own
    seconds: float | None = None  # only so much of its end counts; None: all of it
    path: Path | None = None  # the file, if it is one

    def __post_init__(self) -> None:
        for name, value in (("fps", self.fps), ("seconds", self.seconds)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value} of {self.name}: give a number above 0.")

    @property
    def name(self) -> str:
        return "the clip" if self.path is None else str(self.path)

    def take(self, indices: Sequence[int]) -> Iterator[Frame]:
        """Yield some frames, by rising or repeated indices; what lies between and behind them is read and dropped."""
        place = 0
        with closing(self.read()) as frames:
            for index, frame in enumerate(frames):
                while place < len(indices) and indices[place] == index:
                    yield frame
                    place += 1


@dataclass(frozen=True)
class Cut:
    """The end of a clip that a video continues, in whole blocks of latent frames."""

    indices: tuple[int, ...]  # the clip's frames at the model's rate, 1 + 4 k of them; the last is the clip's last
    num_left_out: int  # frames at the model's rate before them that filled no block

    @property
    def num_latent_frames(self) -> int:
        return 1 + (len(self.indices) - 1) // PIXELS_PER_LATENT


def plan_cut(clip: Clip, kind: str, *, family: ModelFamily, height: int, width: int) -> Cut:
    """Choose the frames of a clip that a model continues, before anything is loaded.

    Raises:
        ValueError: If the model does not start from the kind, or the clip is too short or of another shape.
    """
    first = family.first_block_frames or family.frames_per_block
    least = 1 + PIXELS_PER_LATENT * (first - 1)
    if kind == "image" and first > 1:
        raise ValueError(
            f"a single image is 1 latent frame and this model's first block takes {first}: give a video of {least} "
            f"frames or more ({least / family.fps:.2f} s), the image repeated if need be, or use a model that starts "
            "from an image."
        )
    if kind not in family.starts:
        listed = ", ".join(("text", *family.starts))
        raise ValueError(f"this model does not start from a {kind}; it starts from: {listed}.")
    shares = sorted((clip.width / clip.height, width / height))
    if shares[0] / shares[1] < _LEAST_KEPT:
        raise ValueError(
            f"{clip.name} is {clip.width}x{clip.height}: cropped to the shape of {width}x{height} it would keep "
            f"{shares[0] / shares[1]:.1%} of the picture: crop it yourself, or choose another height and width."
        )
    # The encoder makes one latent frame of the first pixel frame and one of every four behind it.
    fps, step = family.fps, PIXELS_PER_LATENT
    ratio, last = (clip.fps or fps) / fps, clip.num_frames - 1
    num_frames = 1 + math.floor(last / ratio + 1e-6)
    if clip.seconds is not None:
        num_frames = min(num_frames, 1 + step * math.ceil((max(1, round(clip.seconds * fps)) - 1) / step))
    num_latents = 1 + (num_frames - 1) // step
    if num_latents < first:
        raise ValueError(
            f"{clip.name} has {num_frames} frames at the model's {fps:g} per second, the first block takes {least}: "
            f"give {least / fps:.2f} s or more."
        )
    num_latents -= (num_latents - first) % family.frames_per_block
    num_kept = 1 + step * (num_latents - 1)
    indices = tuple(max(0, math.floor(last - ratio * back + 0.5)) for back in reversed(range(num_kept)))
    return Cut(indices, num_frames - num_kept)


def make_clip(video: Any, *, fps: float | None = None, seconds: float | None = None) -> Clip:
    """Open a video, or wrap frames that are in memory.

    Args:
        video: A path; a list of PIL images; or one video as an array or a tensor: (frames, height, width, 3) or
            (frames, 3, height, width), uint8, or floats in [0, 1].
        fps: Frames per second; a file's own, or the model's for frames in memory, unless given.
        seconds: Go on from its last seconds alone.

    Raises:
        ValueError: If it cannot be read, or is none of these.
    """
    if isinstance(video, Clip):
        return replace(video, fps=fps or video.fps, seconds=seconds or video.seconds)
    if isinstance(video, str | Path):
        return _open_file(Path(video), fps, seconds)
    if isinstance(video, list | tuple):
        frames: Any = [_frame(item) for item in video]
        if not frames:
            raise ValueError("the video has no frames.")
        sizes = {_size(frame) for frame in frames}
        if len(sizes) > 1:
            raise ValueError(f"frames of the video differ in size: {sorted(sizes)} (height, width): make them equal.")
        height, width = sizes.pop()
    else:
        frames = _channels_last(video, ndim=4, what="a video")
        height, width = frames.shape[1:3]

    def read() -> Generator[Frame]:
        yield from (frame if isinstance(frame, Image.Image) else _frame(frame) for frame in frames)

    return Clip(num_frames=len(frames), height=height, width=width, read=read, fps=fps, seconds=seconds)


def _open_file(path: Path, fps: float | None, seconds: float | None) -> Clip:
    if not path.is_file():
        raise ValueError(f"there is no video {path}.")
    facts = probe(path)
    if fps is None and facts.fps is None:
        raise ValueError(f"{path} does not state its frames per second: give fps, or re-encode it.")

    def read() -> Generator[Frame]:
        for piece in read_frames(path, facts, length=_PIECE_FRAMES):
            yield from (Image.fromarray(frame) for frame in piece)

    sizes = {"num_frames": facts.num_frames, "height": facts.height, "width": facts.width}
    return Clip(**sizes, read=read, fps=fps or facts.fps, seconds=seconds, path=path)


def make_clips(video: Any) -> list[Clip]:
    """One clip, or one for each prompt: of a list, or of an array or a tensor of five dimensions."""

    def is_picture(item: Any) -> bool:
        return isinstance(item, Image.Image) or (isinstance(item, Tensor | np.ndarray) and item.ndim == 3)

    is_list = isinstance(video, list | tuple) and video and not all(map(is_picture, video))
    is_batch = isinstance(video, Tensor | np.ndarray) and video.ndim == 5
    return [make_clip(item) for item in video] if is_list or is_batch else [make_clip(video)]


def make_stills(image: Any) -> list[Clip]:
    """Clips of one frame: of an image, or of one image for each prompt.

    An image is a path, a PIL image, or an array or tensor (height, width, 3) or (3, height, width); several are a list
    of such, or four dimensions.
    """
    if isinstance(image, list | tuple) or (isinstance(image, Tensor | np.ndarray) and image.ndim == 4):
        if not len(image):
            raise ValueError("the list of images is empty.")
        return [still for item in image for still in make_stills(item)]
    if isinstance(image, Clip):
        return [image]
    if isinstance(image, str | Path):
        return [replace(make_clip([_open_image(Path(image))]), path=Path(image))]
    return [make_clip([image])]


def _open_image(path: Path) -> Image.Image:
    """Read an image file: RGB, turned the way it says; of several pictures the first."""
    if not path.is_file():
        raise ValueError(f"there is no image {path}.")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read {path} as an image: {error}") from error


def _to_pixels(frames: Sequence[Frame], processor: VideoProcessor, *, height: int, width: int) -> Tensor:
    """Bring frames to the video's size and the encoder's range: (3, frames, height, width) float32 in [-1, 1].

    Frames of the right size are taken as they are; others are resized and cropped in the middle, at eight bits.
    """

    def covering(frame: Frame) -> Tensor:
        if isinstance(frame, Tensor):
            if _size(frame) == (height, width):
                return 2.0 * frame[None] - 1.0
            frame = Image.fromarray(frame.mul(255.0).round().byte().permute(1, 2, 0).cpu().numpy())
        return processor.preprocess(frame, height=height, width=width, resize_mode="crop")

    return torch.cat([covering(frame) for frame in frames]).transpose(0, 1)


def _size(frame: Frame) -> tuple[int, int]:
    return (frame.height, frame.width) if isinstance(frame, Image.Image) else (frame.shape[1], frame.shape[2])


def _frame(picture: Any) -> Frame:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    array = _channels_last(picture, ndim=3, what="a picture")
    if array.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(array))
    return torch.from_numpy(np.ascontiguousarray(array, np.float32)).permute(2, 0, 1)


def _channels_last(pixels: Any, *, ndim: int, what: str) -> np.ndarray:
    """A view of (..., height, width, 3) uint8, or floats in [0, 1]."""
    if isinstance(pixels, Tensor):
        pixels = pixels.detach().cpu()
        pixels = (pixels.float() if pixels.is_floating_point() else pixels).numpy()
    if not isinstance(pixels, np.ndarray):
        raise ValueError(f"{what} is a {type(pixels).__name__}: give a path, PIL images, an array or a tensor.")
    if pixels.ndim != ndim or not pixels.size or 3 not in (pixels.shape[-1], pixels.shape[-3]):
        raise ValueError(f"{what} has shape {pixels.shape}: give {ndim} dimensions with 3 channels, first or last.")
    if pixels.dtype != np.uint8 and not (pixels.dtype.kind == "f" and pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(f"{what} is {pixels.dtype} outside [0, 1]: give uint8, or floats in [0, 1].")
    return pixels if pixels.shape[-1] == 3 else np.moveaxis(pixels, -3, -1)
