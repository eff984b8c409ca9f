"""Frame-by-frame decoding and encoding with diffusers' Wan VAE, with a state that can be saved between calls."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from diffusers import AutoencoderKLWan
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanRMS_norm,
    WanUpsample,
    patchify,
    unpatchify,
)
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.nn import functional

from longtake.models.wan import config_of, execution_device, offload_hooks, stock_forward

# The Wan encoder takes one frame first and then four at a time: diffusers fixes this number, not the config.
FRAMES_PER_LATENT = 4

# Kinds of a slot of the feature map. diffusers marks a temporal upsampler that has seen exactly one latent frame with
# the string "Rep".
_EMPTY, _REPEAT, _TENSOR = "empty", "Rep", "tensor"

_State = tuple[dict[str, Tensor], dict[str, Any]]


class _FeatureMap:
    """Past frames of the causal convolutions, kept outside the VAE so that several streams can share it."""

    def __init__(self, module: nn.Module) -> None:
        # One slot for every causal convolution is what diffusers allocates; some of them stay unused.
        num_slots = sum(isinstance(child, WanCausalConv3d) for child in module.modules())
        self.slots: list[Tensor | str | None] = [None] * num_slots

    def state_dict(self) -> tuple[dict[str, Tensor], list[str]]:
        tensors = {f"slot_{i:03d}": slot.contiguous() for i, slot in enumerate(self.slots) if isinstance(slot, Tensor)}
        return tensors, [_TENSOR if isinstance(slot, Tensor) else slot or _EMPTY for slot in self.slots]

    def load_state_dict(
        self, tensors: Mapping[str, Tensor], kinds: list[str], *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        if len(kinds) != len(self.slots):
            raise ValueError(
                f"VAE stream state has {len(kinds)} slots, this VAE has {len(self.slots)}: load it with the VAE "
                "that wrote it"
            )
        slots: list[Tensor | str | None] = []
        for index, kind in enumerate(kinds):
            if kind == _TENSOR:
                slots.append(_required(tensors, f"slot_{index:03d}").to(device=device, dtype=dtype))
            elif kind in (_EMPTY, _REPEAT):
                slots.append(None if kind == _EMPTY else _REPEAT)
            else:
                raise ValueError(f"VAE stream state: slot {index} is {kind!r}; known: {_EMPTY}, {_REPEAT}, {_TENSOR}")
        self.slots = slots

    def move(self, device: torch.device | str) -> None:
        self.slots = [slot.to(device) if isinstance(slot, Tensor) else slot for slot in self.slots]


class _Stream:
    """A video on its way through one half of a VAE.

    Attributes:
        vae: The Wan VAE, unmodified.
        num_frames: Latent frames so far.
    """

    def __init__(self, vae: AutoencoderKLWan, half: nn.Module) -> None:
        self.vae = vae
        self.num_frames = 0
        self._features = _FeatureMap(half)

    def state_dict(self) -> _State:
        tensors, kinds = self._features.state_dict()
        return tensors, {"num_frames": self.num_frames, "slots": kinds}

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue the stream whose ``state_dict`` is given; the next frames are bit-identical.

        Raises:
            ValueError: If the state belongs to a VAE of another shape or is incomplete.
        """
        kinds = _required(numbers, "slots")
        self._features.load_state_dict(tensors, kinds, device=execution_device(self.vae), dtype=self.vae.dtype)
        self.num_frames = int(_required(numbers, "num_frames"))


class StreamingDecoder(_Stream):
    """Latent frames in, pixel frames out, any number at a time; equal to ``vae.decode`` of the whole video.

    Only the last one or two feature frames of every causal convolution are kept. The VAE itself keeps no state and
    may serve several streams. Equal means bit for bit in float32 on the CPU from 4x4 latent positions on; with fewer
    the matrix library rounds a short 1x1x1 convolution differently from a long one (1e-7).

    Source: the frame loop of diffusers' ``AutoencoderKLWan``, with the feature map as the caller's.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__(vae, vae.decoder)

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
        _check_frames(latents, name="latents")
        if self.vae.use_tiling:
            raise ValueError(
                "the VAE's tiling is on, and this stream decodes whole frames: use streaming_decoder(vae), or call "
                "vae.disable_tiling() first"
            )
        frames = _decode_frames(self.vae, latents, self._features.slots, self.num_frames == 0)
        self.num_frames += latents.shape[2]
        return frames


class StreamingEncoder(_Stream):
    """Pixel frames in, latent frames out, any number at a time; equal to ``vae.encode`` of the whole video.

    A latent frame needs one pixel frame (the first) or four (all others). Frames that do not fill a latent frame
    yet wait inside and come out with a later call. Frames are encoded whole, whatever the VAE's tiling.

    Source: the frame loop of diffusers' ``AutoencoderKLWan``, with the feature map as the caller's.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__(vae, vae.encoder)
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
        _check_frames(frames, name="frames")
        if self._waiting is not None:
            frames = torch.cat([self._waiting, frames], dim=2)
        first = 1 if self.num_frames == 0 else 0
        num_groups = first + (frames.shape[2] - first) // FRAMES_PER_LATENT
        end = first + FRAMES_PER_LATENT * (num_groups - first)
        self._waiting = frames[:, :, end:].clone() if end < frames.shape[2] else None
        if not num_groups:
            ratio = _ratio(self.vae)
            batch, _, _, height, width = frames.shape
            return frames.new_empty(batch, config_of(self.vae).z_dim, 0, height // ratio, width // ratio)
        self.num_frames += num_groups
        sizes = [1] * first + [FRAMES_PER_LATENT] * (num_groups - first)
        return _encode_groups(self.vae, frames[:, :, :end].split(sizes, dim=2), self._features.slots)

    def state_dict(self) -> _State:
        tensors, numbers = super().state_dict()
        return tensors if self._waiting is None else tensors | {"waiting": self._waiting.contiguous()}, numbers

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue the stream whose ``state_dict`` is given; the next latents are bit-identical."""
        super().load_state_dict(tensors, numbers)
        waiting = tensors.get("waiting")
        self._waiting = None if waiting is None else waiting.to(execution_device(self.vae), self.vae.dtype)


# The decorator lets accelerate's offload hooks bring the VAE to its device, as they do for ``vae.decode``.
@apply_forward_hook
@torch.no_grad()
def _decode_frames(vae: AutoencoderKLWan, latents: Tensor, slots: list, is_first: bool) -> Tensor:
    return _pixels(vae, _decoded(vae, vae.post_quant_conv(latents).split(1, dim=2), slots, is_first=is_first))


@apply_forward_hook
@torch.no_grad()
def _encode_groups(vae: AutoencoderKLWan, groups: Iterable[Tensor], slots: list) -> Tensor:
    patch_size = config_of(vae).patch_size
    if patch_size is not None:
        groups = (patchify(group, patch_size=patch_size) for group in groups)
    parts = [vae.encoder(group, feat_cache=slots, feat_idx=[0]) for group in groups]
    return vae.quant_conv(_joined(parts)).chunk(2, dim=1)[0]


def _decoded(vae: AutoencoderKLWan, frames: Iterable[Tensor], slots: list, *, is_first: bool) -> Tensor:
    """Latent frames as the decoder makes them: not clamped, pixels still in patches."""
    return _joined(
        [
            vae.decoder(frame, feat_cache=slots, feat_idx=[0], first_chunk=is_first and index == 0)
            for index, frame in enumerate(frames)
        ]
    )


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _pixels(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    patch_size = config_of(vae).patch_size
    return (video if patch_size is None else unpatchify(video, patch_size=patch_size)).clamp(-1.0, 1.0)


def _ratio(vae: AutoencoderKLWan) -> int:
    """Pixel rows, and columns, of a latent position."""
    return cast(int, vae.spatial_compression_ratio)


def _check_frames(tensor: Tensor, *, name: str) -> None:
    if tensor.ndim != 5 or tensor.shape[2] == 0:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: give (batch, channels, frames, height, width) with one frame "
            "or more"
        )


def _required(mapping: Mapping[str, Any], key: str) -> Any:
    if key not in mapping:
        raise ValueError(f"VAE stream state lacks {key!r}: the file is incomplete or not a VAE stream state")
    return mapping[key]


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Sizes of a VAE's tiles, in latent positions; ``AutoencoderKLWan.enable_tiling`` sets them in pixels."""

    height: int
    width: int
    row_stride: int  # from one row of tiles to the next
    column_stride: int

    @classmethod
    def of(cls, vae: AutoencoderKLWan) -> "Tiling":
        """The tiling that is set on a VAE."""
        ratio, sizes = _ratio(vae), []
        for side in ("height", "width"):
            names = f"tile_sample_min_{side}", f"tile_sample_stride_{side}"
            tile, stride = (vars(vae)[name] for name in names)
            if not ratio <= stride <= tile or stride % ratio or tile % ratio:
                raise ValueError(
                    f"VAE tiles of {side} {tile} at stride {stride}: both have to be multiples of {ratio} pixels, and "
                    f"the stride at most the {side}, e.g. enable_tiling({names[0]}={32 * ratio}, "
                    f"{names[1]}={24 * ratio})."
                )
            sizes.append((tile // ratio, stride // ratio))
        (height, row_stride), (width, column_stride) = sizes
        return cls(height=height, width=width, row_stride=row_stride, column_stride=column_stride)

    def starts(self, height: int, width: int) -> tuple[range, range]:
        """First rows and first columns of the tiles of a frame; one tile where the frame is no larger than a tile."""
        if height <= self.height and width <= self.width:
            return range(1), range(1)
        return range(0, height, self.row_stride), range(0, width, self.column_stride)


class TiledDecoder:
    """``StreamingDecoder`` for a VAE whose tiling is on; equal to ``vae.decode`` of the whole video in tiles.

    Each tile keeps the last feature frames of its own causal convolutions; between its turns they rest in host
    memory, for together they are more than those of the whole frame. Tiles are blended as diffusers blends them, by
    its own methods, over rows first and columns second: in float32 bit for bit what ``vae.decode`` gives with the
    same tiles, in any chunking. The sizes are those set when the stream starts.

    Source: diffusers' ``AutoencoderKLWan.tiled_decode``, with the frame loop inside and the feature maps outside.

    Raises:
        ValueError: If the tiles do not overlap or are no multiples of the VAE's factor.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae
        self.tiling = Tiling.of(vae)
        self.num_frames = 0
        self._size: tuple[int, int] | None = None
        self._maps: list[list[_FeatureMap]] = []

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next latent frames of the stream; see ``StreamingDecoder.decode``."""
        _check_frames(latents, name="latents")
        size = (latents.shape[-2], latents.shape[-1])
        if self._size is None:
            self._begin(size)
        if self._size != size:
            raise ValueError(f"latents are {size} where this stream began with {self._size}: start another.")
        video = _decode_tiles(self.vae, latents, self._maps, self.tiling, self.num_frames == 0)
        self.num_frames += latents.shape[2]
        return video

    def state_dict(self) -> _State:
        """Everything that the stream remembers: tensors by tile and slot, and JSON-able numbers."""
        tensors: dict[str, Tensor] = {}
        kinds: dict[str, list[str]] = {}
        for name, features in self._named_maps().items():
            parts, kinds[name] = features.state_dict()
            tensors |= {f"{name}.{key}": value for key, value in parts.items()}
        size = None if self._size is None else list(self._size)
        return tensors, {"num_frames": self.num_frames, "tiling": asdict(self.tiling), "size": size, "slots": kinds}

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue the stream whose ``state_dict`` is given; the next frames are bit-identical."""
        for key in ("num_frames", "tiling", "size", "slots"):
            if key not in numbers:
                raise ValueError(
                    f"VAE stream state lacks {key!r}: it was written without tiling, or is incomplete: continue with "
                    "the VAE's tiling as it was"
                )
        if numbers["tiling"] != asdict(self.tiling):
            raise ValueError(
                f"VAE stream state was written with tiles {numbers['tiling']}, this VAE has {asdict(self.tiling)}: "
                "call enable_tiling with the sizes it was written with"
            )
        self._size, self._maps = None, []
        if numbers["size"] is not None:
            self._begin(tuple(numbers["size"]))
        for name, features in self._named_maps().items():
            prefix = f"{name}."
            parts = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if name not in numbers["slots"]:
                raise ValueError(f"VAE stream state lacks {name!r}: the file is incomplete")
            features.load_state_dict(parts, numbers["slots"][name], device="cpu", dtype=self.vae.dtype)
        self.num_frames = int(numbers["num_frames"])

    def _begin(self, size: tuple[int, int]) -> None:
        rows, columns = self.tiling.starts(*size)
        self._size, self._maps = size, [[_FeatureMap(self.vae.decoder) for _ in columns] for _ in rows]

    def _named_maps(self) -> dict[str, _FeatureMap]:
        return {f"tile_{i}_{j}": features for i, row in enumerate(self._maps) for j, features in enumerate(row)}


def streaming_decoder(vae: AutoencoderKLWan) -> StreamingDecoder | TiledDecoder:
    """Start a stream as the VAE is set: in tiles where its tiling is on, in whole frames otherwise."""
    return TiledDecoder(vae) if vae.use_tiling else StreamingDecoder(vae)


@apply_forward_hook
@torch.no_grad()
def _decode_tiles(
    vae: AutoencoderKLWan, latents: Tensor, maps: list[list[_FeatureMap]], tiling: Tiling, is_first: bool
) -> Tensor:
    height, width = latents.shape[-2:]
    row_starts, column_starts = tiling.starts(height, width)
    if len(row_starts) * len(column_starts) == 1:
        return _pixels(vae, _decode_tile(vae, latents, maps[0][0], is_first))
    rows = []
    for row, row_maps in zip(row_starts, maps, strict=True):
        band = latents[:, :, :, row : row + tiling.height]
        places = zip(column_starts, row_maps, strict=True)
        rows.append([_decode_tile(vae, band[..., j : j + tiling.width], features, is_first) for j, features in places])
    return _pixels(vae, _blended(vae, rows, tiling, (height, width)))


def _decode_tile(vae: AutoencoderKLWan, latents: Tensor, features: _FeatureMap, is_first: bool) -> Tensor:
    features.move(execution_device(vae))
    frames = (vae.post_quant_conv(frame) for frame in latents.split(1, dim=2))
    video = _decoded(vae, frames, features.slots, is_first=is_first)
    features.move("cpu")
    return video


def _blended(vae: AutoencoderKLWan, rows: list[list[Tensor]], tiling: Tiling, size: tuple[int, int]) -> Tensor:
    """Put tiles together, each faded into those above and to the left of it."""
    ratio = _ratio(vae) // (config_of(vae).patch_size or 1)
    height, width, row_stride, column_stride = (
        ratio * value for value in (tiling.height, tiling.width, tiling.row_stride, tiling.column_stride)
    )
    joined = []
    for i, row in enumerate(rows):
        # The fades are in place: a tile is faded out further on as it was faded in.
        for j, tile in enumerate(row):
            if i > 0:
                vae.blend_v(rows[i - 1][j], tile, height - row_stride)
            if j > 0:
                vae.blend_h(row[j - 1], tile, width - column_stride)
        joined.append(torch.cat([tile[..., :row_stride, :column_stride] for tile in row], dim=-1))
    return torch.cat(joined, dim=3)[..., : ratio * size[0], : ratio * size[1]]


class VaePixels:
    """A VAE as a rollout sees it: latents are (batch, frames, channels, height, width) with mean 0 and deviation 1.

    Args:
        vae: The Wan VAE, unmodified; its config has the latents' mean and deviation.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae
        statistics = (config_of(vae).latents_mean, config_of(vae).latents_std)
        self._mean, self._std = (torch.tensor(x, dtype=torch.float32).view(1, -1, 1, 1, 1) for x in statistics)

    def denormalise(self, latents: Tensor) -> Tensor:
        """Latents as the VAE decodes them: (batch, channels, frames, height, width) on its device, in its dtype."""
        z = latents.transpose(1, 2).float()
        z = z * self._std.to(z.device) + self._mean.to(z.device)
        return z.to(execution_device(self.vae), self.vae.dtype)

    def normalise(self, z: Tensor) -> Tensor:
        """Encoded latents as a rollout keeps them: (batch, frames, channels, height, width) float32."""
        z = z.float()
        return ((z - self._mean.to(z.device)) / self._std.to(z.device)).transpose(1, 2)

    @torch.no_grad()
    def pool(self, latents: Tensor, size: tuple[int, int, int]) -> Tensor:
        """Decode latents as a clip of their own, average its pixels over cells, and encode the smaller clip.

        n latent frames become max(1, n // t). The encoder takes 1 + 4 k pixel frames, so the 1 + 4 (n - 1) decoded
        ones are averaged down to just that many evenly spaced, overlapping spans; rows and columns that fill no cell
        are left out.

        Args:
            latents: (batch, frames, channels, height, width), normalised.
            size: Pixel frames, rows and columns of a cell.

        Returns:
            (batch, frames // t or 1, channels, height / h, width / w), normalised, dtype and device of ``latents``.

        Source: PackForcing, arXiv:2603.25730, low-resolution branch.
        """
        frames, rows, columns = size
        video = streaming_decoder(self.vae).decode(self.denormalise(latents))
        height, width = video.shape[-2] // rows, video.shape[-1] // columns
        step = _ratio(self.vae)
        if min(height, width) < step:
            raise ValueError(
                f"pixels of {video.shape[-2]}x{video.shape[-1]} pooled by {rows}x{columns} are {height}x{width}, less "
                f"than the VAE's {step}x{step}: use a larger video or less pooling."
            )
        num_latents = max(1, latents.shape[1] // frames)
        num_frames = 1 + FRAMES_PER_LATENT * (num_latents - 1)
        video = video[..., : height * rows, : width * columns]
        small = functional.adaptive_avg_pool3d(video, (num_frames, height, width))
        return self.normalise(StreamingEncoder(self.vae).encode(small)).to(latents)


_HOOK = "longtake_kernel"
_EPSILON = 1e-12  # of functional.normalize, in units of the norm


def use_fast_kernels(vae: AutoencoderKLWan) -> None:
    """Put hooks on a VAE's causal convolutions, norms and upsamplers that take faster ways on the CPU.

    Results differ from stock by rounding, in the streamed and in the whole decode alike.

    * Convolutions go to oneDNN, which also pads: in float32 PyTorch unrolls a single small video into columns
      instead, three times slower at 64x64 pixels.
    * Norms sum squares over channels by ``sum``: the vector norm over a strided dimension that stock takes is about
      ten times slower than that, and half of the decode in float32.
    * Upsamplers repeat pixels in one copy instead of three.
    """
    for module in vae.modules():
        hook = _hook_for(module)
        # Weights that offloading brings for a call would be missing to a hook outside of it.
        if hook is None or offload_hooks(module):
            continue
        registry = HookRegistry.check_if_exists_or_initialize(module)
        if registry.get_hook(_HOOK) is None:
            registry.register_hook(hook, _HOOK)


def _onednn_takes(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _hook_for(module: nn.Module) -> ModelHook | None:
    if isinstance(module, WanCausalConv3d) and torch.backends.mkldnn.is_available():
        return _OneDnnConvolution()
    if isinstance(module, WanRMS_norm) and module.channel_first and not isinstance(module.bias, Tensor):
        return _SummedNorm()
    if isinstance(module, WanUpsample) and module.mode == "nearest-exact" and module.scale_factor == (2.0, 2.0):
        return _RepeatedPixels()
    return None


class _OneDnnConvolution(ModelHook):
    """``WanCausalConv3d.forward`` with the spatial padding left to the convolution."""

    def new_forward(self, module: WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        if x.device.type != "cpu" or not _onednn_takes(x.dtype):
            return stock_forward(self)(x, cache_x)
        padding: Any = module._padding
        width, _, height, _, num_missing, _ = padding
        if cache_x is not None and num_missing > 0:
            x = torch.cat([cache_x.to(x.device), x], dim=2)
            num_missing -= cache_x.shape[2]
        if num_missing > 0:
            x = functional.pad(x, (0, 0, 0, 0, num_missing, 0))
        return torch.mkldnn_convolution(
            x, module.weight, module.bias, [0, height, width], module.stride, module.dilation, module.groups
        )


class _SummedNorm(ModelHook):
    """``WanRMS_norm.forward`` over channels, squares summed in float32."""

    def new_forward(self, module: WanRMS_norm, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return stock_forward(self)(x)
        power = x.square().sum(dim=1, keepdim=True, dtype=torch.float32)
        factor = power.clamp_min_(_EPSILON**2).rsqrt_().mul_(module.scale)
        return (x * factor.to(x.dtype)).mul_(module.gamma.to(x.dtype))


class _RepeatedPixels(ModelHook):
    """``WanUpsample.forward`` by two in both directions; the same bits."""

    def new_forward(self, module: WanUpsample, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return stock_forward(self)(x)
        batch, channels, height, width = x.shape
        twice = x[..., None, :, None].expand(batch, channels, height, 2, width, 2)
        return twice.reshape(batch, channels, 2 * height, 2 * width)
