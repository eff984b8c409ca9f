"""How a block becomes small: means of stored keys and values, or tokens that a network makes of its clean latents."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

PUBLISHED_CHANNELS = (32, 128, 512, 2048)


def cell_factors(size: tuple[int, int, int], cell: tuple[int, int, int]) -> tuple[int, int, int]:
    """How many frames, rows and columns of tokens become one.

    A row or column factor is halved while fewer than two cells would fit, so that a small grid keeps a picture: 4x4
    tokens become 2x2, where 30x52 become 7x13.

    Args:
        size: Frames, rows and columns of a block's tokens.
        cell: Factors wanted.
    """
    factors = [cell[0]]
    for extent, factor in zip(size[1:], cell[1:], strict=True):
        while factor > 1 and extent // factor < 2:
            factor //= 2
        factors.append(max(factor, 1))
    return tuple(factors)


def num_cells(size: tuple[int, int, int], cell: tuple[int, int, int]) -> tuple[int, int, int]:
    """Frames, rows and columns of a compressed block, rounded down and at least 1: a block of 3 frames becomes 1."""
    return tuple(max(1, extent // factor) for extent, factor in zip(size, cell_factors(size, cell), strict=True))


def pool_tokens(x: Tensor, size: tuple[int, int, int], cells: tuple[int, int, int]) -> Tensor:
    """Means of equal cells; where a size is no multiple, neighbouring cells share tokens, and none is left out.

    Args:
        x: (batch, frames * rows * columns, heads, head_dim), un-rotated: rotated keys would cancel.
        size: Frames, rows, columns.
        cells: Frames, rows, columns afterwards.

    Returns:
        (batch, cells, heads, head_dim), dtype of ``x``; the means are float32.
    """
    grid = x.flatten(2).transpose(1, 2).unflatten(2, size).float()
    pooled = functional.adaptive_avg_pool3d(grid, cells).flatten(2).transpose(1, 2)
    return pooled.to(x.dtype).unflatten(2, x.shape[2:])


class LatentCompressor(nn.Module):
    """The network of PackForcing's high-resolution branch: strided 3-D convolutions of a block's clean latents.

    Four stages with SiLU between them, a 1x1x1 projection to the transformer's width. The first stage halves time,
    the others rows and columns, each axis only while it stays as large as the grid wanted; what is then still too
    large is averaged (60 rows become 30, 15, 8, and 7). So one set of kernels serves any geometry. Kernels are 3x3x3,
    then 1x3x3: the published figure does not give them. The projection starts at zero.

    Args:
        in_channels: Of the latents.
        width: Of the transformer.
        channels: Of the stages; the published ones by default.

    Source: PackForcing, arXiv:2603.25730.
    """

    def __init__(self, in_channels: int, width: int, channels: tuple[int, ...] = PUBLISHED_CHANNELS) -> None:
        super().__init__()
        sizes = [in_channels, *channels]
        kernels = [(3, 3, 3), *[(1, 3, 3)] * (len(channels) - 1)]
        stages = (nn.Conv3d(*sizes[i : i + 2], kernel) for i, kernel in enumerate(kernels))
        self.stages = nn.ModuleList(stages)
        self.projection = nn.Conv3d(channels[-1], width, 1)
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, latents: Tensor, cells: tuple[int, int, int]) -> Tensor:
        """Compress a block.

        Args:
            latents: (batch, frames, channels, height, width), clean.
            cells: Frames, rows and columns wanted.

        Returns:
            (batch, width, *cells).
        """
        x = latents.transpose(1, 2).to(self.projection.weight)
        for index, stage in enumerate(self.stages):
            axes = (0,) if index == 0 else (1, 2)
            stride = [2 if axis in axes and x.shape[2 + axis] >= 2 * cells[axis] else 1 for axis in range(3)]
            padding = [kernel // 2 for kernel in stage.kernel_size]
            x = functional.silu(functional.conv3d(x, stage.weight, stage.bias, stride=stride, padding=padding))
        return self.projection(functional.adaptive_avg_pool3d(x, cells))


def load_compressor(weights: str, kind: str, device: torch.device) -> LatentCompressor:
    """Read trained weights; the sizes of the network are theirs.

    Args:
        weights: Name of a bundled model, or a .safetensors file.
        kind: Which of a bundled model's: ``hr`` stands alone, ``hr+lr`` is added to the other branch; so far both
            are one file, trained as ``hr+lr``.
        device: Where it will run.

    Raises:
        ValueError: If there is no such model or file, or it holds something else.
    """
    path = Path(weights)
    if path.suffix != ".safetensors":
        path = Path(str(files("longtake.models"))) / weights / "compressor" / f"{kind}.safetensors"
    if not path.is_file():
        raise ValueError(
            f"compressor_weights={weights!r}: {path} does not exist; give the name of a bundled model that has a "
            "compressor (mini), or a .safetensors file of scripts/train_compressor.py."
        )
    try:
        state = load_file(path)
        network = _shaped_like(state)
        network.load_state_dict({name: value.float() for name, value in state.items()})
    except (SafetensorError, KeyError, IndexError, RuntimeError) as error:
        raise ValueError(f"compressor_weights={weights!r}: {path} holds no compressor ({error}).") from error
    return network.eval().requires_grad_(False).to(device)


def _shaped_like(state: Mapping[str, Tensor]) -> LatentCompressor:
    num_stages = sum(name.startswith("stages.") and name.endswith(".weight") for name in state)
    kernels = [state[f"stages.{index}.weight"] for index in range(num_stages)]
    channels = tuple(kernel.shape[0] for kernel in kernels)
    return LatentCompressor(kernels[0].shape[1], state["projection.weight"].shape[0], channels)
