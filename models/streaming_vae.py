"""Frame-by-frame decoding and encoding with diffusers' Wan VAE, with a state that can be saved between calls."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from longtake.models.offload import execution_device

# The Wan encoder takes one frame first and then four at a time: diffusers fixes this number, not the config.
FRAMES_PER_LATENT = 4

# What a slot of the feature map may hold besides a tensor. diffusers marks a temporal upsampler that has seen
# exactly one latent frame with the string "Rep".
EMPTY = "empty"
REPEAT = "Rep"
TENSOR = "tensor"


class FeatureMap:
    """The causal convolutions' memory of past frames, kept outside the VAE so that several streams can share it.

    Args:
        module: The VAE's decoder or encoder.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        # One slot for every causal convolution is what diffusers allocates; some of them stay unused.
        num_slots = sum(isinstance(child, WanCausalConv3d) for child in module.modules())
        self.slots: list[Tensor | str | None] = [None] * num_slots

    def state_dict(self) -> tuple[dict[str, Tensor], list[str]]:
        """The tensors by slot, and what every slot holds."""
        tensors: dict[str, Tensor] = {}
        kinds: list[str] = []
        for index, slot in enumerate(self.slots):
            if isinstance(slot, Tensor):
                tensors[f"slot_{index:03d}"] = slot.contiguous()
                kinds.append(TENSOR)
            else:
                kinds.append(EMPTY if slot is None else slot)
        return tensors, kinds

    def load_state_dict(
        self, tensors: Mapping[str, Tensor], kinds: list[str], *, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Take over what ``state_dict`` returned.

        Raises:
            ValueError: If it belongs to another VAE or is incomplete.
        """
        if len(kinds) != len(self.slots):
            raise ValueError(
                f"VAE stream state has {len(kinds)} slots, this VAE has {len(self.slots)}: load it with the VAE "
                "that wrote it"
            )
        slots: list[Tensor | str | None] = []
        for index, kind in enumerate(kinds):
            if kind == TENSOR:
                slots.append(_required(tensors, f"slot_{index:03d}").to(device=device, dtype=dtype))
            elif kind in (EMPTY, REPEAT):
                slots.append(None if kind == EMPTY else REPEAT)
            else:
                raise ValueError(f"VAE stream state: slot {index} is {kind!r}; known: {EMPTY}, {REPEAT}, {TENSOR}")
        self.slots = slots

    def move(self, device: torch.device | str) -> None:
        """Bring the tensors to a device."""
        self.slots = [slot.to(device) if isinstance(slot, Tensor) else slot for slot in self.slots]


class StreamingDecoder:
    """Latent frames in, pixel frames out, any number at a time; equal to ``vae.decode`` of the whole video.

    Memory does not grow with the length of the video: only the last one or two feature frames of every causal
    convolution are kept. One instance is one stream (of any batch size); the VAE itself keeps no state and may
    serve several streams. Equal means bit for bit in float32 on the CPU from 4x4 latent positions on; with fewer
    the matrix library rounds a short 1x1x1 convolution differently from a long one (1e-7).

    Source: the frame loop of diffusers' ``AutoencoderKLWan``, with the feature map as the caller's.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        """Start a stream.

        Args:
            vae: The Wan VAE, unmodified.
        """
        self.vae = vae
        self.num_frames = 0
        self._features = FeatureMap(vae.decoder)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next latent frames of the stream.

        Args:
            latents: (batch, channels, latent frames, height / 8, width / 8), de-normalised: ``z * std + mean``.

        Returns:
            (batch, 3, frames, height, width) in [-1, 1]. The first latent frame of the stream gives one pixel
            frame, every later one four.

        Raises:
            ValueError: If ``latents`` is not 5-D, holds no frame, or the VAE's tiling is on.
        """
        check_frames(latents, name="latents")
        if self.vae.use_tiling:
            raise ValueError(
                "the VAE's tiling is on, and this stream decodes whole frames: use streaming_decoder(vae), or call "
                "vae.disable_tiling() first"
            )
        frames = _decode_frames(self.vae, latents, self._features.slots, self.num_frames == 0)
        self.num_frames += latents.shape[2]
        return frames

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything the stream remembers, as tensors and JSON-able numbers.

        Returns:
            (tensors, numbers): the feature map's tensors by slot, and ``{"num_frames", "slots"}``.
        """
        tensors, kinds = self._features.state_dict()
        return tensors, {"num_frames": self.num_frames, "slots": kinds}

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue the stream whose ``state_dict`` is given; the next frames are bit-identical.

        Args:
            tensors: First value of ``state_dict``.
            numbers: Second value of ``state_dict``.

        Raises:
            ValueError: If the state belongs to a VAE of another shape or is incomplete.
        """
        kinds = _required(numbers, "slots")
        self._features.load_state_dict(tensors, kinds, device=execution_device(self.vae), dtype=self.vae.dtype)
        self.num_frames = int(_required(numbers, "num_frames"))


class StreamingEncoder:
    """Pixel frames in, latent frames out, any number at a time; equal to ``vae.encode`` of the whole video.

    A latent frame needs one pixel frame (the first) or four (all others). Frames that do not fill a latent frame
    yet wait inside and come out with a later call. Frames are encoded whole, whatever the VAE's tiling.

    Source: the frame loop of diffusers' ``AutoencoderKLWan``, with the feature map as the caller's.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        """Start a stream.

        Args:
            vae: The Wan VAE, unmodified.
        """
        self.vae = vae
        self.num_frames = 0
        self._features = FeatureMap(vae.encoder)
        self._waiting: Tensor | None = None

    def encode(self, frames: Tensor) -> Tensor:
        """Encode the next pixel frames of the stream.

        Args:
            frames: (batch, 3, frames, height, width) in [-1, 1].

        Returns:
            (batch, channels, latent frames, height / 8, width / 8): the mode of the posterior, not normalised. There
            may be no latent frame yet, then the third dimension is 0.

        Raises:
            ValueError: If ``frames`` is not 5-D or holds no frame.
        """
        check_frames(frames, name="frames")
        if self._waiting is not None:
            frames = torch.cat([self._waiting, frames], dim=2)
        groups: list[Tensor] = []
        start = 0
        while True:
            length = 1 if self.num_frames + len(groups) == 0 else FRAMES_PER_LATENT
            if start + length > frames.shape[2]:
                break
            groups.append(frames[:, :, start : start + length])
            start += length
        self._waiting = frames[:, :, start:].clone() if start < frames.shape[2] else None
        if not groups:
            ratio = self.vae.spatial_compression_ratio
            batch, _, _, height, width = frames.shape
            return frames.new_empty(batch, self.vae.config.z_dim, 0, height // ratio, width // ratio)
        self.num_frames += len(groups)
        return _encode_groups(self.vae, groups, self._features.slots)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything the stream remembers, as tensors and JSON-able numbers.

        Returns:
            (tensors, numbers): feature map and waiting frames, and ``{"num_frames", "slots"}``.
        """
        tensors, kinds = self._features.state_dict()
        if self._waiting is not None:
            tensors["waiting"] = self._waiting.contiguous()
        return tensors, {"num_frames": self.num_frames, "slots": kinds}

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue the stream whose ``state_dict`` is given; the next latents are bit-identical.

        Args:
            tensors: First value of ``state_dict``.
            numbers: Second value of ``state_dict``.

        Raises:
            ValueError: If the state belongs to a VAE of another shape or is incomplete.
        """
        device, dtype = execution_device(self.vae), self.vae.dtype
        self._features.load_state_dict(tensors, _required(numbers, "slots"), device=device, dtype=dtype)
        self.num_frames = int(_required(numbers, "num_frames"))
        waiting = tensors.get("waiting")
        self._waiting = None if waiting is None else waiting.to(device=device, dtype=dtype)


# The decorator lets accelerate's offload hooks bring the VAE to its device, as they do for ``vae.decode``.
@apply_forward_hook
@torch.no_grad()
def _decode_frames(vae: AutoencoderKLWan, latents: Tensor, slots: list, is_first: bool) -> Tensor:
    projected = vae.post_quant_conv(latents)
    parts = []
    for index in range(latents.shape[2]):
        frame = projected[:, :, index : index + 1]
        parts.append(vae.decoder(frame, feat_cache=slots, feat_idx=[0], first_chunk=is_first and index == 0))
    video = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
    if vae.config.patch_size is not None:
        video = unpatchify(video, patch_size=vae.config.patch_size)
    return video.clamp(-1.0, 1.0)


@apply_forward_hook
@torch.no_grad()
def _encode_groups(vae: AutoencoderKLWan, groups: list[Tensor], slots: list) -> Tensor:
    parts = []
    for group in groups:
        if vae.config.patch_size is not None:
            group = patchify(group, patch_size=vae.config.patch_size)
        parts.append(vae.encoder(group, feat_cache=slots, feat_idx=[0]))
    moments = vae.quant_conv(torch.cat(parts, dim=2) if len(parts) > 1 else parts[0])
    return moments.chunk(2, dim=1)[0]


def check_frames(tensor: Tensor, *, name: str) -> None:
    """Refuse what is no video.

    Raises:
        ValueError: If ``tensor`` is not 5-D or holds no frame.
    """
    if tensor.ndim != 5 or tensor.shape[2] == 0:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: give (batch, channels, frames, height, width) with one frame "
            "or more"
        )


def _required(mapping: Mapping[str, Any], key: str) -> Any:
    if key not in mapping:
        raise ValueError(f"VAE stream state lacks {key!r}: the file is incomplete or not a VAE stream state")
    return mapping[key]
