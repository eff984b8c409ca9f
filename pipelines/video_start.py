"""What a video goes on from: images, clips or latents, encoded as the rollout takes them in."""

import logging
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from longtake.configs.families import ModelFamily
from longtake.models import StreamingEncoder, VaePixels
from longtake.models.streaming_vae import FRAMES_PER_LATENT
from longtake.pipelines.clips import Clip, Cut, check_crop, cut_clip, make_clips, make_stills, to_pixels
from longtake.pipelines.given import GivenLatents, TensorLatents

logger = logging.getLogger(__name__)


class EncodedClips:
    """Clips of equal length as given latents: read, resized and encoded a block at a time.

    Args:
        clips: One for all samples, or one per sample.
        cuts: Their frames.
        vae: Encodes.
        processor: Brings pictures to the encoder's range.
        height: Pixels.
        width: Pixels.
        batch_size: Samples.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        cuts: Sequence[Cut],
        *,
        vae: AutoencoderKLWan,
        processor: VideoProcessor,
        height: int,
        width: int,
        batch_size: int,
    ) -> None:
        self.num_frames = cuts[0].num_latent_frames
        self._vae, self._processor = vae, processor
        self._size = {"height": height, "width": width}
        self._batch_size = batch_size
        self._frames = [clip.take(cut.indices) for clip, cut in zip(clips, cuts, strict=True)]
        self._encoder = StreamingEncoder(vae)
        self._pixels = VaePixels(vae)

    @torch.no_grad()
    def take(self, num_frames: int) -> Tensor:
        """Encode the next latent frames: (batch, frames, channels, height, width), normalised.

        Raises:
            ValueError: If a file turns out to be damaged.
        """
        num_pictures = FRAMES_PER_LATENT * num_frames - (0 if self._encoder.num_frames else FRAMES_PER_LATENT - 1)
        pictures = [list(islice(frames, num_pictures)) for frames in self._frames]
        if any(len(own) != num_pictures for own in pictures):
            raise ValueError("the clip has fewer frames than when it was opened: was it replaced?")
        videos = torch.stack([to_pixels(own, self._processor, **self._size) for own in pictures])
        latents = self._encoder.encode(videos.to(self._vae.device, self._vae.dtype))
        if self._encoder.num_frames == self.num_frames:
            for frames in self._frames:
                # To its end: that is where a damaged file is found out.
                next(frames, None)
        return self._pixels.normalise(latents).expand(self._batch_size, -1, -1, -1, -1)


def make_start(
    *,
    image: Any = None,
    video: Any = None,
    video_latents: Tensor | GivenLatents | None = None,
    family: ModelFamily,
    frames_per_block: int,
    vae: AutoencoderKLWan,
    processor: VideoProcessor,
    height: int,
    width: int,
    batch_size: int,
) -> GivenLatents | None:
    """Turn what a pipeline was given into given latents of a rollout.

    Args:
        image: What ``make_stills`` takes.
        video: What ``make_clips`` takes.
        video_latents: (batch, channels, latent frames, height, width), normalised, whole blocks; or a stream.
        family: Of the model.
        frames_per_block: Of the rollout.
        vae: Encodes.
        processor: Brings pictures to the encoder's range.
        height: Pixels of the video.
        width: Pixels of the video.
        batch_size: Samples.

    Returns:
        What ``LatentRollout`` takes; None where nothing is given.

    Raises:
        ValueError: If several are given, the model starts from none of the kind, or a clip is too short.
    """
    given = {"image": image, "video": video, "video_latents": video_latents}
    given = [name for name, value in given.items() if value is not None]
    if not given:
        return None
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given: a video goes on from one of them.")
    if video_latents is not None:
        size = (height // vae.spatial_compression_ratio, width // vae.spatial_compression_ratio)
        return _from_latents(video_latents, batch_size=batch_size, channels=vae.config.z_dim, size=size)
    clips = make_stills(image) if image is not None else make_clips(video)
    if len(clips) not in (1, batch_size):
        raise ValueError(f"{len(clips)} {given[0]}s for {batch_size} samples: give one, or one per sample.")
    cuts = [
        plan_start(clip, given[0], family=family, frames_per_block=frames_per_block, height=height, width=width)
        for clip in clips
    ]
    lengths = sorted({cut.num_latent_frames for cut in cuts})
    if len(lengths) > 1:
        raise ValueError(f"the videos fill {lengths} latent frames: give equally long ones, or make them one by one.")
    left_out = cuts[0].num_left_out
    if left_out:
        logger.warning(
            "%d frames (%.2f s) at the beginning of the clip fill no block and are left out.",
            left_out,
            left_out / family.fps,
        )
    return EncodedClips(clips, cuts, vae=vae, processor=processor, height=height, width=width, batch_size=batch_size)


def plan_start(
    clip: Clip, kind: str, *, family: ModelFamily, frames_per_block: int | None = None, height: int, width: int
) -> Cut:
    """Choose the frames that a model goes on from, or say why it cannot; no weights are needed.

    Args:
        clip: The clip; of one frame for an image.
        kind: ``image`` or ``video``.
        family: Of the model.
        frames_per_block: Where it is not the family's.
        height: Pixels of the video.
        width: Pixels of the video.

    Raises:
        ValueError: If the model does not start from such, the clip is too short, or a crop would keep nothing of it.
    """
    block = frames_per_block or family.frames_per_block
    first = family.first_block_frames or block
    if kind == "image" and first > 1:
        least = 1 + FRAMES_PER_LATENT * (first - 1)
        raise ValueError(
            f"a single image is 1 latent frame and this model's first block takes {first}: give a video of {least} "
            f"frames or more ({least / family.fps:.2f} s), the image repeated if need be, or use a model that starts "
            "from an image."
        )
    if kind not in family.starts:
        raise ValueError(f"this model does not start from a {kind}; it starts from: {_listed(family.starts)}.")
    check_crop(clip, height=height, width=width)
    return cut_clip(clip, fps=family.fps, first_block_frames=first, frames_per_block=block)


def _from_latents(
    latents: Tensor | GivenLatents, *, batch_size: int, channels: int, size: tuple[int, int]
) -> GivenLatents:
    if not isinstance(latents, Tensor):
        return latents
    shape = tuple(latents.shape)
    if latents.ndim != 5 or shape[0] not in (1, batch_size) or (shape[1], *shape[3:]) != (channels, *size):
        raise ValueError(
            f"video_latents has shape {shape}, expected ({batch_size}, {channels}, frames, {size[0]}, {size[1]})."
        )
    return TensorLatents(latents.transpose(1, 2).expand(batch_size, -1, -1, -1, -1))


def _listed(starts: Sequence[str]) -> str:
    return ", ".join(("text", *starts))
