"""Streaming decode in overlapping tiles: every tile is a stream of its own, so that large frames fit a small card."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from longtake.models.offload import execution_device
from longtake.models.streaming_vae import FeatureMap, StreamingDecoder, check_frames


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Sizes of a VAE's tiles, in latent positions; ``AutoencoderKLWan.enable_tiling`` sets them in pixels.

    Attributes:
        height: Of a tile.
        width: Of a tile.
        row_stride: From one row of tiles to the next.
        column_stride: From one column of tiles to the next.
    """

    height: int
    width: int
    row_stride: int
    column_stride: int

    @classmethod
    def of(cls, vae: AutoencoderKLWan) -> "Tiling":
        """What is set on a VAE.

        Raises:
            ValueError: If tiles would not overlap or cover the frame.
        """
        ratio = vae.spatial_compression_ratio
        names = ("tile_sample_min_{0}", "tile_sample_stride_{0}")
        for side in ("height", "width"):
            tile, stride = (getattr(vae, name.format(side)) for name in names)
            if not ratio <= stride <= tile or stride % ratio or tile % ratio:
                raise ValueError(
                    f"VAE tiles of {side} {tile} at stride {stride}: both have to be multiples of {ratio} pixels, and "
                    f"the stride at most the {side}, e.g. enable_tiling({names[0].format(side)}={32 * ratio}, "
                    f"{names[1].format(side)}={24 * ratio})."
                )
        return cls(
            height=vae.tile_sample_min_height // ratio,
            width=vae.tile_sample_min_width // ratio,
            row_stride=vae.tile_sample_stride_height // ratio,
            column_stride=vae.tile_sample_stride_width // ratio,
        )

    def starts(self, height: int, width: int) -> tuple[range, range]:
        """First rows and first columns of the tiles of a frame; one tile where the frame is no larger than a tile."""
        if height <= self.height and width <= self.width:
            return range(1), range(1)
        return range(0, height, self.row_stride), range(0, width, self.column_stride)


@dataclass
class _Tiles:
    """The streams of a frame's tiles, row by row."""

    size: tuple[int, int]
    maps: list[list[FeatureMap]] = field(default_factory=list)


class TiledDecoder:
    """``StreamingDecoder`` for a VAE whose tiling is on; equal to ``vae.decode`` of the whole video in tiles.

    Each tile keeps the last feature frames of its own causal convolutions; between its turns they rest in host
    memory, for together they are more than those of the whole frame. Tiles are blended as diffusers blends them, by
    its own methods, over rows first and columns second: in float32 bit for bit what ``vae.decode`` gives with the
    same tiles, in any chunking. The sizes are those set when the stream starts.

    Source: diffusers' ``AutoencoderKLWan.tiled_decode``, with the frame loop inside and the feature maps outside.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        """Start a stream.

        Args:
            vae: The Wan VAE, unmodified, with ``enable_tiling`` called.

        Raises:
            ValueError: If the tiles do not overlap or are no multiples of the VAE's factor.
        """
        self.vae = vae
        self.tiling = Tiling.of(vae)
        self.num_frames = 0
        self._tiles: _Tiles | None = None

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next latent frames of the stream.

        Args:
            latents: (batch, channels, latent frames, height / 8, width / 8), de-normalised: ``z * std + mean``.

        Returns:
            (batch, 3, frames, height, width) in [-1, 1]. The first latent frame of the stream gives one pixel
            frame, every later one four.

        Raises:
            ValueError: If ``latents`` is not 5-D, holds no frame, or has another size than those before.
        """
        check_frames(latents, name="latents")
        size = (latents.shape[-2], latents.shape[-1])
        if self._tiles is None:
            self._tiles = self._make_tiles(size)
        if self._tiles.size != size:
            raise ValueError(f"latents are {size} where this stream began with {self._tiles.size}: start another.")
        video = _decode_tiles(self.vae, latents, self._tiles.maps, self.tiling, self.num_frames == 0)
        self.num_frames += latents.shape[2]
        return video

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything the stream remembers, as tensors and JSON-able numbers.

        Returns:
            (tensors, numbers): the feature maps' tensors by tile and slot, and
            ``{"num_frames", "tiling", "size", "slots"}``.
        """
        tensors: dict[str, Tensor] = {}
        kinds: dict[str, list[str]] = {}
        for name, features in self._named_maps():
            parts, kinds[name] = features.state_dict()
            tensors |= {f"{name}.{key}": value for key, value in parts.items()}
        size = None if self._tiles is None else list(self._tiles.size)
        return tensors, {"num_frames": self.num_frames, "tiling": asdict(self.tiling), "size": size, "slots": kinds}

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue the stream whose ``state_dict`` is given; the next frames are bit-identical.

        Args:
            tensors: First value of ``state_dict``.
            numbers: Second value of ``state_dict``.

        Raises:
            ValueError: If the state was written with other tiles or without, by another VAE, or is incomplete.
        """
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
        self._tiles = None if numbers["size"] is None else self._make_tiles(tuple(numbers["size"]))
        for name, features in self._named_maps():
            prefix = f"{name}."
            parts = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if name not in numbers["slots"]:
                raise ValueError(f"VAE stream state lacks {name!r}: the file is incomplete")
            features.load_state_dict(parts, numbers["slots"][name], device=torch.device("cpu"), dtype=self.vae.dtype)
        self.num_frames = int(numbers["num_frames"])

    def _make_tiles(self, size: tuple[int, int]) -> _Tiles:
        rows, columns = self.tiling.starts(*size)
        return _Tiles(size, [[FeatureMap(self.vae.decoder) for _ in columns] for _ in rows])

    def _named_maps(self) -> Iterator[tuple[str, FeatureMap]]:
        for row, maps in enumerate(self._tiles.maps if self._tiles is not None else ()):
            for column, features in enumerate(maps):
                yield f"tile_{row}_{column}", features


def streaming_decoder(vae: AutoencoderKLWan) -> StreamingDecoder | TiledDecoder:
    """Start a stream as the VAE is set: in tiles where its tiling is on, in whole frames otherwise.

    Args:
        vae: The Wan VAE, unmodified.

    Raises:
        ValueError: If its tiles do not fit together.
    """
    return TiledDecoder(vae) if vae.use_tiling else StreamingDecoder(vae)


# The decorator lets accelerate's offload hooks bring the VAE to its device, as they do for ``vae.decode``.
@apply_forward_hook
@torch.no_grad()
def _decode_tiles(
    vae: AutoencoderKLWan, latents: Tensor, maps: list[list[FeatureMap]], tiling: Tiling, is_first: bool
) -> Tensor:
    height, width = latents.shape[-2:]
    row_starts, column_starts = tiling.starts(height, width)
    is_tiled = len(row_starts) * len(column_starts) > 1
    rows = [
        [
            _decode_tile(vae, _cut(latents, row, column, tiling) if is_tiled else latents, features, is_first)
            for column, features in zip(column_starts, row_maps, strict=True)
        ]
        for row, row_maps in zip(row_starts, maps, strict=True)
    ]
    video = _blended(vae, rows, tiling, (height, width)) if is_tiled else rows[0][0]
    if vae.config.patch_size is not None:
        video = unpatchify(video, patch_size=vae.config.patch_size)
    return video.clamp(-1.0, 1.0)


def _cut(latents: Tensor, row: int, column: int, tiling: Tiling) -> Tensor:
    return latents[:, :, :, row : row + tiling.height, column : column + tiling.width]


def _decode_tile(vae: AutoencoderKLWan, latents: Tensor, features: FeatureMap, is_first: bool) -> Tensor:
    """One tile of the next frames, as the decoder makes it: not clamped, pixels still in patches."""
    features.move(execution_device(vae))
    parts = []
    for index in range(latents.shape[2]):
        frame = vae.post_quant_conv(latents[:, :, index : index + 1])
        first = is_first and index == 0
        parts.append(vae.decoder(frame, feat_cache=features.slots, feat_idx=[0], first_chunk=first))
    features.move("cpu")
    return torch.cat(parts, dim=2)


def _blended(vae: AutoencoderKLWan, rows: list[list[Tensor]], tiling: Tiling, size: tuple[int, int]) -> Tensor:
    """Put tiles together, each faded into those above and to the left of it."""
    ratio = vae.spatial_compression_ratio // (vae.config.patch_size or 1)
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
