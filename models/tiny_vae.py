"""A small decoder that stands in for the Wan VAE's: the layout of TAEHV's files, streamed frame by frame.

Only the decoder: latents come from the transformer, and whatever needs an encoder keeps the real VAE.

Source: TAEHV's published weights and documentation (github.com/madebyollin/taehv); docs/models.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from longtake.models.conversion import shape_faults

_NUM_STAGES = 3
_NUM_MEMORIES = 3  # per stage
_STAGE_ENTRIES = _NUM_MEMORIES + 3  # the memories; an upsampling, which has no weights; the growth; a convolution
_FIRST_STAGE = 3  # place of the first memory: soft limit, convolution and activation come before
_LAST = _FIRST_STAGE + _NUM_STAGES * _STAGE_ENTRIES + 1  # place of the last convolution


@dataclass(frozen=True)
class TinyLayout:
    """Sizes of a decoder; the defaults are those of ``taew2_1``, for Wan 2.1."""

    latent_channels: int = 16  # of the VAE that it stands in for
    widths: tuple[int, ...] = (256, 128, 64, 64)  # channels of the three stages, and behind the last
    growths: tuple[int, ...] = (1, 2, 2)  # frames that a stage makes of one
    patch_size: int = 1  # pixels that lie in the channels of the last convolution, in rows and columns

    @property
    def frames_per_latent(self) -> int:
        return math.prod(self.growths)

    @property
    def pixels_per_latent(self) -> int:
        """Pixel rows, and columns, of a latent position."""
        return 2**_NUM_STAGES * self.patch_size

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> "TinyLayout":
        """Read the sizes off a file's tensors; what is not there is as in ``taew2_1``."""
        usual = cls()

        def size(name: str, axis: int, otherwise: int) -> int:
            shape = shapes.get(f"decoder.{name}weight", ())
            return max(1, shape[axis]) if axis < len(shape) else otherwise

        widths, growths = [size("1.", 0, usual.widths[0])], []
        for stage in range(_NUM_STAGES):
            end = _FIRST_STAGE + (stage + 1) * _STAGE_ENTRIES - 1
            grown = size(f"{end - 1}.conv.", 0, usual.growths[stage] * widths[-1])
            growths.append(max(1, grown // widths[-1]))
            widths.append(size(f"{end}.", 0, usual.widths[stage + 1]))
        patch_size = max(1, math.isqrt(size(f"{_LAST}.", 0, 3 * usual.patch_size**2) // 3))
        return cls(size("1.", 1, usual.latent_channels), tuple(widths), tuple(growths), patch_size)


class _FrameMemory(nn.Module):
    """Three convolutions over a frame and the one before it, added to the frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        rest = [nn.ReLU(), _convolution(width, width), nn.ReLU(), _convolution(width, width)]
        self.conv = nn.Sequential(_convolution(2 * width, width), *rest)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return functional.relu(self.conv(torch.cat([x, before], dim=1)) + x)


class _Growth(nn.Module):
    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, growth * width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).unflatten(1, (-1, x.shape[1])).flatten(0, 1)


class TinyVae(nn.Module):
    """The decoder's weights, under the names they have in TAEHV's files."""

    def __init__(self, layout: TinyLayout = TinyLayout()) -> None:
        super().__init__()
        self.layout = layout
        widths = layout.widths
        parts: dict[int, nn.Module] = {1: _convolution(layout.latent_channels, widths[0])}
        for stage, growth in enumerate(layout.growths):
            start = _FIRST_STAGE + stage * _STAGE_ENTRIES
            parts |= {start + index: _FrameMemory(widths[stage]) for index in range(_NUM_MEMORIES)}
            parts[start + _STAGE_ENTRIES - 2] = _Growth(widths[stage], growth)
            parts[start + _STAGE_ENTRIES - 1] = _convolution(widths[stage], widths[stage + 1], bias=False)
        parts[_LAST] = _convolution(widths[-1], 3 * layout.patch_size**2)
        self.decoder = nn.ModuleDict({str(place): part for place, part in parts.items()})

    @property
    def weight(self) -> Tensor:
        """Weight of the first convolution: has the decoder's device, dtype and width."""
        return self.decoder["1"].get_parameter("weight")

    def denormalise(self, latents: Tensor) -> Tensor:
        """Latents as this decoder takes them: (batch, channels, frames, height, width), normalised as they are."""
        return latents.transpose(1, 2).to(self.weight)

    def decode_frame(self, latent: Tensor, before: dict[str, Tensor]) -> Tensor:
        """Decode one latent frame.

        Args:
            latent: (batch, channels, height, width), normalised.
            before: Each memory's last input by name, none of them for the first frame; replaced.

        Returns:
            (batch, ``frames_per_latent``, 3, height, width), about [0, 1].
        """
        batch = latent.shape[0]
        x = functional.relu(self.decoder["1"](3.0 * torch.tanh(latent / 3.0)))
        for stage in range(_NUM_STAGES):
            start = _FIRST_STAGE + stage * _STAGE_ENTRIES
            for place in range(start, start + _NUM_MEMORIES):
                frames = x.unflatten(0, (batch, -1))
                name = f"memory_{place:02d}"
                last = before[name] if name in before else torch.zeros_like(frames[:, 0])
                # A copy: a view would keep all frames of the stage alive, and share memory in a saved state.
                before[name] = frames[:, -1].clone()
                x = self.decoder[str(place)](x, torch.cat([last[:, None], frames[:, :-1]], dim=1).flatten(0, 1))
            # The files' order is the other one; a 1x1 product commutes with repeated pixels and costs a quarter here.
            x = self.decoder[str(start + _STAGE_ENTRIES - 2)](x)
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
            x = self.decoder[str(start + _STAGE_ENTRIES - 1)](x)
        x = self.decoder[str(_LAST)](functional.relu(x))
        return functional.pixel_shuffle(x, self.layout.patch_size).unflatten(0, (batch, -1))


class StreamingTinyDecoder:
    """``StreamingDecoder`` over a tiny VAE: latent frames in, pixel frames out, any number at a time.

    Each of the nine memories keeps its last input, and nothing else is kept: no frame is ever decoded twice, and the
    result does not depend on how the latents are split. The weights may serve several streams.
    """

    def __init__(self, vae: TinyVae) -> None:
        self.vae = vae
        self.num_frames = 0
        self._before: dict[str, Tensor] = {}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next latent frames of the stream, normalised and of the weights' dtype.

        Shapes as in ``StreamingDecoder.decode``.

        Raises:
            ValueError: If ``latents`` is not 5-D, holds no frame, or has another number of channels.
        """
        layout = self.vae.layout
        if latents.ndim != 5 or latents.shape[2] == 0 or latents.shape[1] != layout.latent_channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}: give (batch, {layout.latent_channels}, frames, height, "
                "width) with one frame or more"
            )
        parts = []
        for latent in latents.unbind(2):
            frames = self.vae.decode_frame(latent, self._before)
            # The first frame has no past: of what grows out of it, only the last pixel frame is of the video.
            parts.append(frames if self.num_frames else frames[:, -1:])
            self.num_frames += 1
        return torch.cat(parts, dim=1).clamp(0.0, 1.0).mul(2.0).sub(1.0).transpose(1, 2)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the stream remembers: the memories, none before the first frame, and ``num_frames``."""
        return dict(self._before), {"num_frames": self.num_frames}

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue the stream whose ``state_dict`` is given; the next frames are bit-identical."""
        if "num_frames" not in numbers:
            raise ValueError("VAE stream state lacks 'num_frames': the file is incomplete or no VAE stream state")
        widths = {}
        for place, part in self.vae.decoder.items():
            if isinstance(part, _FrameMemory):
                widths[f"memory_{int(place):02d}"] = part.conv[0].out_channels
        found = {name: tensor.shape[1] for name, tensor in tensors.items() if tensor.ndim == 4}
        if found != (widths if numbers["num_frames"] else {}) or len(found) != len(tensors):
            raise ValueError(
                "VAE stream state was not written by this fast VAE: go on with the VAE that the video was begun with"
            )
        self._before = {name: tensor.to(self.vae.weight) for name, tensor in tensors.items()}
        self.num_frames = int(numbers["num_frames"])


def load_tiny_vae(path: Path) -> TinyVae:
    """Load a decoder; its sizes are read off the file, and every tensor has to be of them.

    Args:
        path: ``taew2_1.pth`` or ``taew2_1.safetensors``, or a file of the same layout. An encoder in it is left out.

    Returns:
        The decoder in float32, on the CPU.

    Raises:
        ValueError: If the file cannot be read, or lists tensors that are missing, of another shape, or unknown.
    """
    tensors = {name: tensor for name, tensor in _read(path).items() if not name.startswith("encoder.")}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    layout = TinyLayout.of(shapes)
    with torch.device("meta"):
        vae = TinyVae(layout)
    wanted = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    faults = shape_faults(shapes, wanted)
    if faults:
        raise ValueError(f"{path} is no TAEHV decoder such as taew2_1: {faults}.")
    vae.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True, assign=True)
    return vae.eval().requires_grad_(False)


def _convolution(in_channels: int, out_channels: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"fast VAE '{path}' does not exist: give a file such as taew2_1.safetensors.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError, SafetensorError) as error:
        raise ValueError(f"cannot read the fast VAE {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(values, Mapping) or not all(isinstance(value, Tensor) for value in values.values()):
        raise ValueError(f"fast VAE {path} is no mapping of names to tensors.")
    return dict(values)
